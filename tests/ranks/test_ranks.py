"""Answers of tensor parallel ranks under a real `mpirun`, on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from build.conversion.convert import ConvertOptions
from runtime.ranks.parallel_vision import spread
from tests.conftest import FP8, FP32, Workshop
from tests.support.ranks import ANSWERS, PHOTO, ROOT, command, engine_of, finished, needs_mpi
from tests.support.tolerances import FLOAT32_LOGITS, FP8_FLIPPED
from tools.tiny.evaluation import TASKS, write_requests

IMAGES = ROOT / "tests" / "data" / "images"
TRAINED_MODEL = ROOT / "models" / "nvlm-d-tiny"
SPLIT = ("attention.qkv.", "attention.dense.weight", "mlp.fc.", "mlp.gate.", "mlp.proj.weight")

pytestmark = [needs_mpi, pytest.mark.mpi]


def write_questions(path: Path, count: int) -> Path:
    """Writes questions of no, one and three images; every fifth is sampled with a seed."""
    small, dot = IMAGES / "photo_36x36.png", IMAGES / "pixel_1x1.png"
    pictures = [[PHOTO], [], [small], [dot, PHOTO, small]]
    lines = []
    for i in range(count):
        line: dict[str, object] = {
            "id": i,
            "prompt": f"Question {i}: what is this?",
            "images": [str(picture) for picture in pictures[i % 4]],
            "max_new_tokens": 8,
        }
        if i % 5 == 4:
            line |= {"temperature": 0.9, "top_k": 50, "seed": i}
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


def ask(many: Path, one: Path, requests: Path, num_ranks: int, folder: Path) -> dict[str, Any]:
    words = command(num_ranks, ANSWERS, many, one, requests, folder)
    result = finished(words, folder, timeout=250)
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "found.json").read_text())
    assert isinstance(found, dict)
    return found


def weight_bytes(engine: Path, tp_size: int) -> float:
    """What a rank of `tp_size` may hold of the weights that this engine of one rank has: its part
    of each tensor that is split, the whole of the others."""
    total = 0.0
    with safe_open(engine / "llm" / "rank0.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            tensor = file.get_tensor(name)
            is_split = name == "lm_head.weight" or any(part in name for part in SPLIT)
            if tensor.ndim > 0 and tensor.numel() > 1:
                total += tensor.nbytes / (tp_size if is_split else 1)
    return total


@pytest.mark.parametrize("tp_size", [2, 4])
def test_float32_ranks_give_the_tokens_and_logits_of_one_from_their_own_files(
    workshop: Workshop, tmp_path: Path, tp_size: int
) -> None:
    """In batches, streamed, sampled, beside a request that is cancelled; of up to three images."""
    engine = partial(engine_of, workshop, options=FP32)
    requests = write_questions(tmp_path / "in.jsonl", 12)
    found = ask(engine(tp_size), engine(1), requests, tp_size, tmp_path)
    assert len(found["many"]["token_ids"]) == 12
    assert found["many"] == found["one"]
    assert len(found["many"]["streamed"]) >= 8
    assert len(set(map(tuple, found["many"]["token_ids"]))) > 8
    assert max(row["logit_error"] for row in found["differences"]) <= FLOAT32_LOGITS
    most = weight_bytes(engine(1), tp_size)
    for rank in range(tp_size):
        held = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert held["files"] == ["config.json", f"rank{rank}.safetensors"]
        assert 0.9 * most < held["bytes"] <= most


def fp8_pair(
    workshop: Workshop, model: Path, name: str, *, quantize_lm_head: bool = False
) -> tuple[Path, Path]:
    """Engines of two ranks and of one, with the scales of one calibration."""
    options = replace(FP8, quantize_lm_head=quantize_lm_head)
    one = workshop.checkpoint(f"{name}_1", model, options)
    cached = ConvertOptions(
        tp_size=2,
        calib_cache=one / "quantization_report.json",
        quantize_lm_head=quantize_lm_head,
    )
    checkpoints = (workshop.checkpoint(f"{name}_2", model, cached), one)
    two, alone = (
        workshop.engine(f"{path.name}_engine", path, vision="torch", max_num_images=3)
        for path in checkpoints
    )
    return two, alone


def check_fp8(found: dict[str, Any]) -> None:
    """An e4m3 value between two numbers may round to either; then what it goes into is off."""
    pairs = list(zip(found["many"]["token_ids"], found["one"]["token_ids"], strict=True))
    num_equal = sum(ours == expected for ours, expected in pairs)
    assert len(pairs) == 40
    assert num_equal >= 39, f"{num_equal} of 40 answers are equal"
    errors = [row["logit_error"] for row in found["differences"] if row["logit_error"] is not None]
    assert max(errors) <= FP8_FLIPPED, f"logits {max(errors):.2e} apart"
    assert not any(map(math.isnan, errors))


@pytest.mark.parametrize("quantize_lm_head", [False, True], ids=["head in dtype", "head in FP8"])
def test_fp8_ranks_give_the_tokens_of_one(
    workshop: Workshop, tmp_path: Path, quantize_lm_head: bool
) -> None:
    name = f"fp8_ranks{'_fp8_head' * quantize_lm_head}"
    model = workshop.model("model")
    two, one = fp8_pair(workshop, model, name, quantize_lm_head=quantize_lm_head)
    check_fp8(ask(two, one, write_questions(tmp_path / "in.jsonl", 40), 2, tmp_path))


@pytest.mark.slow
def test_fp8_ranks_of_a_trained_model_give_the_answers_of_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    two, one = fp8_pair(workshop, TRAINED_MODEL, "fp8_trained")
    requests = write_requests(tmp_path / "questions", per_task=40 // len(TASKS))
    check_fp8(ask(two, one, requests, 2, tmp_path))


def test_tiles_are_spread_evenly() -> None:
    assert spread(7, 4) == [2, 2, 2, 1]
    assert spread(1, 2) == [1, 0]
