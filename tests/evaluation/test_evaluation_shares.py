"""Shares of a benchmark over machines: examples/slurm_shares.sh with a double of srun, and
examples/ray_shares.py with a Ray of this machine. Two processes each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.benchmarks import Benchmark, ocrbench
from tests.support.command import GENERATE, ROOT, run_command

NUM_SHARES = 2
SRUN = r"""#!/bin/bash
# Two tasks at once, with variables that Slurm lists; the largest exit code.
echo "$*" >> "$SRUN_LOG"
while [ "${1#--}" != "$1" ]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 SLURM_NTASKS=2 "$@" &
    tasks="${tasks-} $!"
done
code=0
for each in $tasks; do wait "$each" || { found=$?; [ $found -gt $code ] && code=$found; }; done
exit $code
"""


def lines(prefix: Path, partition: int) -> list[str]:
    path = Path(f"{prefix}-OCRBench-dprank=0-partition={partition}.jsonl")
    return path.read_text().splitlines()


def flags(engine_dir: Path, made: Benchmark, prefix: Path) -> list[str]:
    common = ("--engine_dir", engine_dir, "--device", "cpu", "--max_new_tokens", 2)
    return [str(each) for each in (*common, *made.run_flags, "--output_path", prefix)]


@pytest.fixture
def whole(float32_engine_dir: Path, tmp_path: Path) -> list[str]:
    """The lines of one process that answers everything."""
    given = flags(float32_engine_dir, ocrbench(tmp_path), tmp_path / "whole")
    assert run_command(*GENERATE, *given).exit_code == 0
    return sorted(lines(tmp_path / "whole", 0))


def slurm(folder: Path, given: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    srun = folder / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text(SRUN)
    srun.chmod(0o755)
    return subprocess.run(
        ["/bin/bash", str(ROOT / "examples" / "slurm_shares.sh"), *given],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{srun.parent}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SRUN_LOG": str(folder / "srun.log"),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_tasks_of_slurm_answer_what_one_process_does(
    float32_engine_dir: Path, whole: list[str], tmp_path: Path
) -> None:
    prefix = tmp_path / "shares"
    given = flags(float32_engine_dir, ocrbench(tmp_path), prefix)
    done = slurm(tmp_path, given)
    assert done.returncode == 0, done.stderr
    both = [lines(prefix, share) for share in range(NUM_SHARES)]
    assert all(both), "each has a part"
    assert sorted([*both[0], *both[1]]) == whole
    assert "OCRBench" in done.stdout
    assert (tmp_path / "srun.log").read_text().startswith("--mpi=none --kill-on-bad-exit=0 ")
    Path(f"{prefix}-OCRBench-dprank=0-partition=1.jsonl").write_text("")
    again = slurm(tmp_path, given)
    assert again.returncode == 0, again.stderr
    assert "0 of them now" in again.stderr, "the share that was whole"
    assert sorted([*both[0], *lines(prefix, 1)]) == whole


def test_a_mistake_is_the_jobs_exit_code(float32_engine_dir: Path, tmp_path: Path) -> None:
    made = ocrbench(tmp_path)
    given = flags(float32_engine_dir, made, tmp_path / "shares")
    given[given.index("--task") + 1] = "OCRBenches"
    done = slurm(tmp_path, given)
    assert done.returncode == 2
    assert done.stderr.count("--task") >= NUM_SHARES, done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="requirements/ray.txt is not installed"
)
def test_workers_of_ray_answer_what_one_process_does(
    float32_engine_dir: Path, whole: list[str], tmp_path: Path
) -> None:
    prefix = tmp_path / "shares"
    given = flags(float32_engine_dir, ocrbench(tmp_path), prefix)
    own = ["--num_shares", str(NUM_SHARES), "--gpus_per_share", "0", "--cpus_per_share", "0.5"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "ray_shares.py"), *own, *given],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(each for share in range(NUM_SHARES) for each in lines(prefix, share)) == whole
