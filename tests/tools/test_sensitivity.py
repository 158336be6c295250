"""One part in FP8 at a time: all of them together are the FP8 engine, none of them is the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from build.conversion.report.quantization_report import QuantizationReport
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.program.errors import UserError
from tests.conftest import BF16, CPU, TINY, Workshop
from tests.support.cases import PHOTO
from tests.support.decoding import engine_logits
from tests.support.tolerances import KERNEL_LOGITS, relative_error
from tools.sensitivity import __main__ as sensitivity
from tools.sensitivity.parts import parts
from tools.sensitivity.whole_model import SequenceAttention, WholeModel

PROMPT, TOKENS = list(range(10, 40)), list(range(100, 116))


@pytest.fixture(scope="module")
def bf16_checkpoint(workshop: Workshop, model_dir: Path) -> Path:
    return workshop.checkpoint("bf16_checkpoint", model_dir, BF16)


@pytest.fixture(scope="module")
def model(bf16_checkpoint: Path, checkpoint_dir: Path) -> WholeModel:
    config = CheckpointConfig.read(bf16_checkpoint / "config.json")
    report = QuantizationReport.read(checkpoint_dir / "quantization_report.json")
    return WholeModel(bf16_checkpoint, config, report, CPU)


@torch.inference_mode()
def logits(model: WholeModel, name: str) -> torch.Tensor:
    """With a part in FP8, of all tokens at once."""
    known = {part.name: part for part in parts(TINY.num_hidden_layers, "linear", True)}
    with model.quantised(known[name]) as caches:
        hidden = model.embed(PROMPT + TOKENS[:-1], None)
        states = model.run(hidden, SequenceAttention(caches))
        return model.logits(states[-len(TOKENS) :])


def test_the_whole_decoder_in_fp8_is_the_fp8_engine(model: WholeModel, engine_dir: Path) -> None:
    found = engine_logits(engine_dir, PROMPT, TOKENS)
    assert relative_error(logits(model, "decoder"), found) < KERNEL_LOGITS
    assert relative_error(logits(model, "vision"), found) > 3 * KERNEL_LOGITS


def test_without_a_part_it_is_the_unquantised_engine(
    model: WholeModel, workshop: Workshop, bf16_checkpoint: Path
) -> None:
    engine = workshop.engine("bf16_engine_torch", bf16_checkpoint, vision="torch")
    found = engine_logits(engine, PROMPT, TOKENS)
    assert relative_error(logits(model, "vision"), found) < KERNEL_LOGITS


def test_one_linear_changes_less_than_all_and_nothing_stays_changed(model: WholeModel) -> None:
    plain = logits(model, "vision")
    one = relative_error(logits(model, "layers.1.mlp.proj"), plain)
    whole = relative_error(logits(model, "decoder"), plain)
    assert 0 < one < whole
    assert torch.equal(logits(model, "vision"), plain)


@pytest.mark.parametrize("by", ["linear", "layer", "kind"])
def test_parts_of_every_grouping_cover_the_decoder_once(by: str) -> None:
    *single, whole = parts(3, by, has_vision_scales=False)
    pieces = [piece for part in single for piece in part.pieces]
    assert len(pieces) == len(set(pieces)) == 3 * 6
    assert set(pieces) == whole.pieces


def ask(folder: Path, *flags: object) -> Any:
    """Runs the tool in this process; its result."""
    place = folder / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["sensitivity", *map(str, flags), "--output", str(place), "--device", "cpu"]
        patch.setattr("sys.argv", arguments)
        sensitivity.main()
    return json.loads(place.read_text())


def test_the_tool_lists_every_part_worst_first(
    bf16_checkpoint: Path, checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jsonl").write_text(
        json.dumps({"prompt": "What?", "image": str(PHOTO)}) + "\n"
    )
    start = ("--checkpoint_dir", bf16_checkpoint, "--report")
    found = ask(
        tmp_path,
        *(*start, checkpoint_dir / "quantization_report.json"),
        *("--questions", tmp_path / "photo.jsonl", "--by", "kind", "--max_new_tokens", 4),
    )
    names = {row["part"] for row in found["parts"]}
    linears = {"attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"}
    assert names == linears | {"kv_cache", "decoder", "vision", "everything"}
    divergences = [row["divergence"] for row in found["parts"]]
    assert divergences == sorted(divergences, reverse=True)
    assert min(row["logits_error"] for row in found["parts"]) > 0
    assert found["num_questions"] == 1
    assert "| everything |" in capsys.readouterr().out


def test_bad_input_is_reported_in_one_line(
    workshop: Workshop, model_dir: Path, bf16_checkpoint: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    report = checkpoint_dir / "quantization_report.json"
    two = workshop.checkpoint("bf16_two_ranks", model_dir, replace(BF16, tp_size=2))
    for checkpoint, message in ((checkpoint_dir, "--quant_algo FP8"), (two, "2 ranks")):
        with pytest.raises(UserError, match=message):
            ask(tmp_path, "--checkpoint_dir", checkpoint, "--report", report)
    with pytest.raises(UserError, match="as --report"):
        ask(tmp_path, "--checkpoint_dir", bf16_checkpoint, "--report", tmp_path / "none.json")
    assert list(tmp_path.iterdir()) == []
