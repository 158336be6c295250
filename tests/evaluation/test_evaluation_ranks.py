"""A benchmark under a real `mpirun`: the first rank reads and writes, the others compute."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import FP32, Workshop
from tests.support.benchmarks import ocrbench
from tests.support.command import GENERATE, run_command
from tests.support.ranks import ROOT, command, engine_of, finished, needs_mpi

pytestmark = [needs_mpi, pytest.mark.mpi]


def test_two_ranks_write_the_lines_of_one(workshop: Workshop, tmp_path: Path) -> None:
    made = ocrbench(tmp_path)
    flags = ("--device", "cpu", *made.run_flags, "--max_new_tokens", 6, "--output_path")
    start = ("--engine_dir", engine_of(workshop, 2, FP32), *flags)
    result = finished(
        command(2, ROOT / "evaluate.py", "generate", *start, tmp_path / "two"), tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("3 of 3 samples answered, 3 of them now") == 1
    alone = ("--engine_dir", engine_of(workshop, 1, FP32), *flags, tmp_path / "one")
    assert run_command(*GENERATE, *alone).exit_code == 0
    lines = [
        sorted((tmp_path / f"{name}-OCRBench-dprank=0-partition=0.jsonl").read_text().splitlines())
        for name in ("two", "one")
    ]
    assert len(lines[0]) == 3
    assert lines[0] == lines[1]
    again = finished(
        command(2, ROOT / "evaluate.py", "generate", *start, tmp_path / "two"), tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert "0 of them now" in again.stderr


@pytest.mark.parametrize("words", [(), ("nothing",), ("generate", "--task", "OCRBench")])
def test_a_wrong_command_line_is_reported_once(words: tuple[str, ...], tmp_path: Path) -> None:
    result = finished(command(2, ROOT / "evaluate.py", *words), tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1, result.stderr


@pytest.mark.parametrize("what", ["data", "record", "image"])
def test_what_is_wrong_with_the_data_is_reported_once(
    what: str, workshop: Workshop, tmp_path: Path
) -> None:
    """Before the engine is loaded, while the others wait for work, and of a single sample."""
    made = ocrbench(tmp_path)
    answers = tmp_path / "out-OCRBench-dprank=0-partition=0.jsonl"
    if what == "data":
        made.gt_paths[0].write_text("{")
        code, message = 2, "is not valid JSON"
    elif what == "record":
        answers.write_text('{"sample_id": 0, "answer": "?"}\n')
        code, message = 2, "is missing, so what made them is unknown"
    else:
        (made.image_dir / "IIIT5K" / "a.png").unlink()
        code, message = 1, "OCRBench sample 0: image"
    engine = engine_of(workshop, 2, FP32)
    flags = ("--device", "cpu", *made.run_flags, "--max_new_tokens", 2)
    words = command(
        2,
        ROOT / "evaluate.py",
        "generate",
        "--engine_dir",
        engine,
        *flags,
        "--output_path",
        tmp_path / "out",
    )
    result = finished(words, tmp_path)
    assert result.returncode == code, result.stderr
    assert result.stderr.count(message) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "died" not in result.stderr
    if what == "image":
        assert len(answers.read_text().splitlines()) == 2
