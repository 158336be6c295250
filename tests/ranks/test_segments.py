"""Shared memory of MPI: a job that is killed leaves none, and other jobs' is not touched."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from runtime.ranks.segments import forget_segments
from tests.support.ranks import command, needs_mpi, started

SHARED = Path("/dev/shm")
PREFIX = "mpich_shm_"

PROGRAM = """
import os, sys, time
from nvlm.program.launcher import World
from runtime.ranks.mpi import Job

job = Job(World.from_environment(os.environ))
job.__enter__()
job.gather(0)
if job.world.rank == 0:
    maps = open("/proc/self/maps").read()
    words = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/mpich_shm_" in line}
    print("segments:", *words, file=sys.stderr, flush=True)
time.sleep(600)
"""


@needs_mpi
@pytest.mark.mpi
def test_a_job_whose_every_process_is_killed_leaves_no_segment(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    root = Path(__file__).resolve().parents[2]
    program.write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\n{PROGRAM}")
    with started(command(2, program), tmp_path) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(120, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        printed = next((line for line in process.stderr if line.startswith("segments:")), None)
        watchdog.cancel()
        assert printed is not None, "the job ended before its ranks met"
    names = [Path(word).name for word in printed.split() if PREFIX in word]
    if not names:
        pytest.skip("this MPI library is not MPICH")
    assert [name for name in names if (SHARED / name).exists()] == []


def test_only_what_this_process_maps_and_mpich_named_is_removed(tmp_path: Path) -> None:
    number = f"{os.getpid():x}"
    mine, others = SHARED / f"{PREFIX}{number}_0", SHARED / f"{PREFIX}{number}_1"
    foreign = SHARED / f"nvlm_test_{number}_0"
    for path in (mine, others, foreign):
        path.write_bytes(b"x")
    maps = tmp_path / "maps"
    line = "7f0000000000-7f0000200000 rw-s 00000000 00:1a 7    "
    maps.write_text(f"{line}{mine}\n{line}{foreign}\n7f00-7f01 rw-p 00000000 00:00 0\n")
    try:
        forget_segments(maps)
        assert [path.exists() for path in (mine, others, foreign)] == [False, True, True]
    finally:
        for path in (mine, others, foreign):
            path.unlink(missing_ok=True)
