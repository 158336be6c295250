"""The benchmark of a task beside the engine runs at a tiny size, and compares like with like."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench.photos import write_photos
from bench.serving.evaluation import measure
from runtime.serving.runner import Runner


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU form is what is tested")
def test_the_task_answers_from_files_what_the_engine_answers_from_tiles(
    tmp_path: Path, engine_dir: Path
) -> None:
    options = argparse.Namespace(num_samples=3, repeats=1, max_new_tokens=2)
    with Runner.open(engine_dir, torch.device("cpu")) as runner:
        found = measure(runner, tmp_path, options)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {line["sample_id"] for line in lines} == {0, 1, 2}
    assert found["num_tiles"] >= 3
    seconds_alone, seconds = (3 / found[f"{name}_samples_per_s"] for name in ("engine", "task"))
    assert found["task_share_of_engine"] == pytest.approx(seconds_alone / seconds)


def test_no_two_pictures_are_the_same(tmp_path: Path) -> None:
    """Otherwise a pass would find another's blocks in the KV cache."""
    pictures = {path.read_bytes() for path in write_photos(tmp_path, 12)}
    assert len(pictures) == 12
