"""A single rank opens nothing of runtime/ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.program.launcher import World
from runtime.ranks.mpi import Job
from tests.support.command import ROOT

PROGRAM = """
import runpy, sys
try:
    runpy.run_path("run.py", run_name="__main__")
except SystemExit as end:
    found = [name for name in sys.modules if name.split(".")[0] == "mpi4py"]
    found += [name for name in sys.modules if name.startswith("runtime.ranks")]
    sys.exit(f"{end.code}, imported {found}")
"""


@pytest.mark.process
def test_a_question_on_one_rank_imports_nothing_of_ranks(float32_engine_dir: Path) -> None:
    flags = ("--engine_dir", float32_engine_dir, "--prompt", "hi", "--max_new_tokens", "1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "0, imported []", done.stderr


def test_a_job_is_of_several_ranks() -> None:
    with pytest.raises(AssertionError, match="a single rank opens none of this"):
        Job(World())
