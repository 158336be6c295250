"""Checkpoints with float32 scales, which older versions wrote: they run, and are said to be so."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from build.conversion.convert import convert
from build.conversion.decoder_step import DecoderStep
from build.conversion.quantization.scales import scaled_anew
from build.conversion.report.quantization_report import QuantizationReport
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import ACTIVATION_SCALE, WEIGHT_SCALE, LinearScales
from nvlm.model.number_formats import FP8 as FP8_FORMAT
from nvlm.program.errors import UserError
from runtime.doctor import examine, lines
from tests.conftest import BF16, CPU, FP8, FP32, MEMORY_BYTES, Workshop
from tests.reference import fp8_e4m3
from tests.support.asking import answered
from tests.support.command import BUILD, CONVERT, RUN, run_command
from tests.support.damage import edit_json
from tests.support.older_checkpoint import write_older_checkpoint

OLDER = "has float32 scales, of an older version: TensorRT-LLM casts them to bfloat16"
TP2 = replace(FP8, tp_size=2)
UNITS_BEFORE_HEAD = 7
"""Vision's embeddings, its two layers and the projector, the embedding, two layers."""


@pytest.fixture(scope="module")
def older(workshop: Workshop, model_dir: Path) -> Path:
    return write_older_checkpoint(model_dir, workshop.root / "older_checkpoint", FP8)


@pytest.fixture(scope="module")
def older_engine(workshop: Workshop, older: Path) -> Path:
    return workshop.engine("older_engine", older, vision="torch", vision_precision="FP8")


def scales_of(checkpoint: Path) -> dict[str, float]:
    tensors = load_file(checkpoint / "rank0.safetensors")
    tensors |= load_file(checkpoint / "vision" / "scales.safetensors")
    kinds = (WEIGHT_SCALE, ACTIVATION_SCALE)
    return {name: float(tensors[name]) for name in tensors if name.endswith(kinds)}


def tensor_files(checkpoint: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in checkpoint.rglob("*.safetensors")
    }


def test_new_scales_are_bfloat16_numbers_just_above_the_older_ones(
    checkpoint_dir: Path, older: Path
) -> None:
    """KV scales are the same: no one casts them."""
    before, after = scales_of(older), scales_of(checkpoint_dir)
    assert before.keys() == after.keys()
    assert any(scale != float(torch.tensor(scale).bfloat16()) for scale in before.values())
    for name, scale in after.items():
        assert scale == float(torch.tensor(scale).bfloat16()), name
        assert before[name] <= scale <= before[name] * (1 + 2**-7), name
    caches = [
        {name: tensor for name, tensor in load_file(path).items() if "kv_cache" in name}
        for path in (older / "rank0.safetensors", checkpoint_dir / "rank0.safetensors")
    ]
    assert caches[0] == caches[1]
    assert caches[0]


@pytest.mark.parametrize("options", [FP8, TP2], ids=["TP1", "TP2"])
def test_a_cache_of_an_older_conversion_gives_what_a_calibration_gives(
    older: Path,
    workshop: Workshop,
    fresh: Workshop,
    model_dir: Path,
    caplog: pytest.LogCaptureFixture,
    options: object,
) -> None:
    name = "checkpoint" if options is FP8 else "checkpoint_tp2"
    calibrated = workshop.checkpoint(name, model_dir, options)  # type: ignore[arg-type]
    flags = ("--model_dir", model_dir, "--output_dir", fresh.root / "new", "--device", "cpu")
    ranks = ("--tp_size", options.tp_size)  # type: ignore[attr-defined]
    cache = older / "quantization_report.json"
    result = run_command(CONVERT, *flags, *ranks, "--calib_cache", cache)
    assert result.exit_code == 0, result.stderr
    assert tensor_files(fresh.root / "new") == tensor_files(calibrated)
    assert f"{cache} has float32 scales: its amax are taken and scales are rounded up" in (
        caplog.text
    )
    report = json.loads((fresh.root / "new" / "quantization_report.json").read_text())
    assert report["scale_dtype"] == "bfloat16"


def test_a_cache_of_this_version_gives_it_too_and_says_nothing(
    checkpoint_dir: Path, fresh: Workshop, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = checkpoint_dir / "quantization_report.json"
    again = fresh.checkpoint("new", model_dir, replace(FP8, calib_cache=cache))
    assert tensor_files(again) == tensor_files(checkpoint_dir)
    assert "scales" not in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_cache_is_rounded_up_to_the_dtype_asked_for(checkpoint_dir: Path, dtype: str) -> None:
    report = QuantizationReport.read(checkpoint_dir / "quantization_report.json")
    prefix = "transformer.layers.0."
    rows, _ = report.rows_of(prefix)
    found = {
        row.linear: row
        for row in scaled_anew(prefix, DECODER_LINEARS, rows, FP8_FORMAT, TORCH_DTYPES[dtype])
    }
    assert found[f"{prefix}mlp.fc"].scales == found[f"{prefix}mlp.gate"].scales
    for row in rows:
        if "mlp.fc" not in row.linear and "mlp.gate" not in row.linear:
            assert found[row.linear].scales == LinearScales(
                fp8_e4m3.linear_scale(row.weight_amax, dtype),
                fp8_e4m3.linear_scale(row.input_amax, dtype),
            )
        assert replace(found[row.linear], scales=row.scales) == row, "the rest is as it was"


def test_a_cache_whose_inputs_exceed_the_dtype_is_refused(checkpoint_dir: Path) -> None:
    report = QuantizationReport.read(checkpoint_dir / "quantization_report.json")
    rows, _ = report.rows_of("transformer.layers.0.")
    rows[0] = replace(rows[0], input_amax=1e5)
    with pytest.raises(UserError, match=f"{rows[0].linear} .100000.0.; use --dtype bfloat16"):
        scaled_anew("transformer.layers.0.", DECODER_LINEARS, rows, FP8_FORMAT, torch.float16)


def test_an_interrupted_conversion_of_an_older_version_starts_over(
    checkpoint_dir: Path, tmp_path: Path, model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Never half of the scales in one type and half in the other."""
    journal = tmp_path / "new.partial" / ".journal"

    def interrupt(*_: object) -> None:
        """At the head, once the units before it are on the disk; they are written behind."""
        for _ in range(600):
            if journal.exists() and journal.read_bytes().count(b"\n") == 1 + UNITS_BEFORE_HEAD:
                break
            time.sleep(0.1)
        raise KeyboardInterrupt

    with (
        patch.object(DecoderStep, "_run_last", side_effect=interrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        write_older_checkpoint(model_dir, tmp_path / "new", FP8)
    first, *done = journal.read_text().splitlines(keepends=True)
    assert len(done) == UNITS_BEFORE_HEAD
    made_from = json.loads(first)
    del made_from["arguments"]["scale_dtype"]
    journal.write_text(json.dumps(made_from) + "\n" + "".join(done))
    flags = ("--model_dir", model_dir, "--output_dir", tmp_path / "new", "--device", "cpu")
    result = run_command(CONVERT, *flags, "--calib_size", FP8.calib_size)
    assert result.exit_code == 0, result.stderr
    assert "is of other arguments, input or versions: starting over" in caplog.text
    assert tensor_files(tmp_path / "new") == tensor_files(checkpoint_dir)


def test_an_older_checkpoint_is_not_up_to_date(
    older: Path, tmp_path: Path, model_dir: Path, checkpoint_dir: Path
) -> None:
    shutil.copytree(older, tmp_path / "old")
    flags = ("--model_dir", model_dir, "--output_dir", tmp_path / "old", "--device", "cpu")
    result = run_command(CONVERT, *flags, "--calib_size", FP8.calib_size, "--if_stale")
    assert result.exit_code == 0, result.stderr
    assert tensor_files(tmp_path / "old") == tensor_files(checkpoint_dir)


def test_the_plan_says_what_scales_are_rounded_to(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--model_dir", model_dir, "--output_dir", tmp_path / "out", "--dry_run")
    result = run_command(CONVERT, *flags)
    assert json.loads(result.stdout)["scale_dtype"] == "bfloat16"
    message = (
        "scales of linears are amax / 448, rounded up to bfloat16, to which TensorRT-LLM casts"
    )
    assert message in caplog.text
    caplog.clear()
    result = run_command(CONVERT, *flags, "--quant_algo", "none")
    assert json.loads(result.stdout)["scale_dtype"] is None
    assert "scales" not in caplog.text


def test_an_older_engine_answers(older_engine: Path) -> None:
    assert answered(older_engine, "--prompt", "What is this?")["num_tokens"] == 2


def test_compare_says_which_engine_is_older(
    older_engine: Path, engine_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("--prompt", "What?", "--device", "cpu", "--max_new_tokens", 2, "--json")
    for engine, reference, older in (
        (engine_dir, older_engine, [older_engine]),
        (older_engine, engine_dir, [older_engine]),
        (engine_dir, engine_dir, []),
    ):
        caplog.clear()
        result = run_command(RUN, "--engine_dir", engine, "--compare", reference, *asked)
        assert result.exit_code == 0, result.stderr
        found = [line for line in caplog.messages if "float32 scales" in line]
        assert len(found) == len(older)
        for line, each in zip(found, older, strict=True):
            assert line.startswith(f"{each} {OLDER}")
            assert "convert again" in line


def test_the_doctor_says_what_a_directory_is(
    older: Path, older_engine: Path, checkpoint_dir: Path, engine_dir: Path, workshop: Workshop
) -> None:
    model_dir = workshop.model("model")
    plain = workshop.checkpoint("checkpoint_bf16", model_dir, BF16)
    wide = workshop.checkpoint("fp8_in_float32", model_dir, replace(FP8, dtype="float32"))
    directories = [older, older_engine, checkpoint_dir, engine_dir, plain, wide]
    *_, first, second, third, fourth, fifth, sixth = lines(examine(directories))
    assert first.strip().startswith(f"{older} {OLDER}")
    assert second.strip().startswith(f"{older_engine} {OLDER}")
    assert third.strip() == f"checkpoint {checkpoint_dir}: scales in bfloat16, KV cache FP8"
    assert fourth.strip() == f"engine {engine_dir}: scales in bfloat16, KV cache FP8"
    assert fifth.strip() == f"checkpoint {plain}: linears without scales, KV cache bfloat16"
    assert sixth.strip() == f"checkpoint {wide}: scales in float32, KV cache FP8"


def test_the_scales_decide_and_not_the_version_that_wrote_the_manifest(
    older: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    """0a14daf builds engines of new checkpoints, and writes new scales from a new report."""
    new = tmp_path / "new"
    shutil.copytree(checkpoint_dir, new)
    edit_json(new / "manifest.json", "arguments.scale_dtype", ...)
    old = tmp_path / "old"
    shutil.copytree(older, old)
    edit_json(old / "manifest.json", "arguments.scale_dtype", "bfloat16")
    *_, first, second = lines(examine([new, old]))
    assert first.strip() == f"checkpoint {new}: scales in bfloat16, KV cache FP8"
    assert second.strip().startswith(f"{old} {OLDER}")


def test_the_doctor_says_what_is_missing_of_an_unfinished_checkpoint(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    unfinished = tmp_path / "checkpoint.partial"
    shutil.copytree(checkpoint_dir, unfinished)
    (unfinished / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest.json, expected a finished checkpoint"):
        examine([unfinished])


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("linears.0.input_amax", float("nan"), "input_amax of .* is nan"),
        ("linears.0.weight_amax", float("inf"), "weight_amax of .* is inf"),
        ("linears.0.weight_amax", -1, "weight_amax of .* is -1"),
        ("linears.0.input_amax", True, "input_amax of .* is True"),
        ("linears.0.input_amax", "7", "input_amax of .* is '7'"),
        ("attention.0.k_amax", float("nan"), "k_amax of .* is nan"),
        ("scale_dtype", "bananas", "scale_dtype is 'bananas'"),
    ],
)
def test_a_cache_that_holds_no_magnitude_is_refused(
    path: str, value: object, expected: str, checkpoint_dir: Path, tmp_path: Path
) -> None:
    values = json.loads((checkpoint_dir / "quantization_report.json").read_text())
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = values
    for key in keys:
        place = place[key]
    place[last] = value
    damaged = tmp_path / "report.json"
    damaged.write_text(json.dumps(values))
    with pytest.raises(UserError, match=expected):
        QuantizationReport.read(damaged)


@pytest.mark.parametrize("linear", ["transformer.layers.1.mlp.proj", "vision_model"])
def test_a_cache_without_a_row_is_refused(
    linear: str, model_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    values = json.loads((checkpoint_dir / "quantization_report.json").read_text())
    first = next(row for row in values["linears"] if row["linear"].startswith(linear))
    values["linears"].remove(first)
    damaged = tmp_path / "report.json"
    damaged.write_text(json.dumps(values))
    options = replace(FP8, calib_cache=damaged)
    with pytest.raises(UserError, match=f"--calib_cache has no row {first['linear']}"):
        convert(HuggingFaceSource(model_dir), tmp_path / "out", options, CPU)


def test_older_float32_and_unquantised_checkpoints_are_as_good_as_new(
    fresh: Workshop, model_dir: Path
) -> None:
    for name, options in (("float32", replace(FP32, quant_algo="FP8")), ("none", BF16)):
        checkpoint = fresh.checkpoint(name, model_dir, replace(options, calib_size=2))
        edit_json(checkpoint / "manifest.json", "arguments.scale_dtype", ...)
        *_, line = lines(examine([checkpoint]))
        assert "older version" not in line


def test_a_build_for_tensorrt_llm_warns_of_an_older_checkpoint(
    older: Path,
    checkpoint_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("build.engines.specification.choose_decoder", lambda *_: "tensorrt_llm")
    monkeypatch.setattr("build.engines.specification._packages", lambda *_: {})
    monkeypatch.setattr("build.engines.specification.plugin_config", lambda *_: None)
    for directory, is_older in ((older, True), (checkpoint_dir, False)):
        caplog.clear()
        specify(directory, BuildOptions(vision="torch"), CPU, MEMORY_BYTES)
        assert (f"{directory} {OLDER}" in caplog.text) == is_older


def test_a_build_for_torch_has_nothing_to_warn_of(
    older: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--checkpoint_dir", older, "--engine_dir", tmp_path / "engine", "--device", "cpu")
    result = run_command(BUILD, *flags, "--decoder", "torch", "--vision", "torch", "--dry_run")
    assert result.exit_code == 0, result.stderr
    assert "scales" not in caplog.text
