"""A clock that jumps, as when it is set by hand or by the network, changes nothing but a date."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tqdm.std

from nvlm.formats.manifest import read_manifest
from tests.support.asking import ask
from tests.support.command import CONVERT, ROOT, RUN, run_command

DATED = {"build/conversion/convert.py", "evaluation/asking/task_run.py"}
"""What says on which day something was made."""
STAMPED = {f"frontends/openai/{name}.py" for name in ("access_log", "call", "door")}
"""What says when an answer or a line of the access log was made."""
ROOMS = ("nvlm", "build", "runtime", "evaluation", "frontends")


def test_five_files_alone_read_the_wall_clock_and_only_to_report_it() -> None:
    """Every limit and every duration is by clocks that nobody sets."""
    reads = re.compile(
        r"\btime\.(time(_ns)?|ctime|localtime|gmtime|strftime)\(|\bdatetime\.(now|today)"
    )
    found = {
        str(path.relative_to(ROOT)): reads.findall(path.read_text())
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    assert {name for name, reading in found.items() if reading} == DATED | STAMPED
    assert all(found[name] == [("strftime", "", "")] for name in DATED)


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that goes a year ahead and back with each look at it."""
    clock, jumps = time.time, itertools.cycle((0.0, 3.2e7, -3.2e7))

    def jumped() -> float:
        return clock() + next(jumps)

    monkeypatch.setattr(time, "time", jumped)
    monkeypatch.setattr(tqdm.std, "time", jumped)


def answers(path: Path) -> list[dict[str, Any]]:
    return [{**json.loads(line), "timings": None} for line in path.read_bytes().splitlines()]


def batch(engine_dir: Path, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    lines = [{"id": i, "prompt": f"Question {i}?"} for i in range(12)]
    (folder / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ("--input_file", folder / "in", "--output_file", folder / "out")
    result = run_command(RUN, *ask(engine_dir, *files))
    assert result.exit_code == 0, result.stderr
    return answers(folder / "out")


def test_a_conversion_under_a_jumping_clock_makes_the_same(
    model_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    calibration = tmp_path / "calibration.jsonl"
    calibration.write_text('{"prompt": "How many shapes are there?"}\n')
    flags = ("--model_dir", model_dir, "--calib_data", calibration, "--device", "cpu")
    assert run_command(CONVERT, *flags, "--output_dir", tmp_path / "steady").exit_code == 0
    request.getfixturevalue("jumping")
    assert run_command(CONVERT, *flags, "--output_dir", tmp_path / "jumping").exit_code == 0
    steady, jumped = (read_manifest(tmp_path / n, "checkpoint") for n in ("steady", "jumping"))
    assert steady.digest == jumped.digest


def test_a_batch_under_a_jumping_clock_answers_the_same(
    engine_dir: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    steady = batch(engine_dir, tmp_path / "steady")
    request.getfixturevalue("jumping")
    assert batch(engine_dir, tmp_path / "jumping") == steady
