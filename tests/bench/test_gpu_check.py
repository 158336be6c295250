"""bench/gpu_check.sh refuses what it does not know before it makes anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.sh"


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "found", "fix"),
    [
        ([], "no folder for results", "give OUT_FOLDER"),
        (["out", "kernels", "kernel"], "kernel is no part", "vision kernels attention"),
        (["out", "rank_.*"], "rank_.* is no part", "expected some of"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: list[str], found: str, fix: str, tmp_path: Path
) -> None:
    command = ["bash", str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert found in line
    assert fix in line
    assert not done.stdout
    assert not list(tmp_path.iterdir())
