"""Starts jobs of several ranks, and makes engines for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from build.conversion.convert import ConvertOptions
from tests.conftest import FP8, Workshop
from tools.model_dir import Shape

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "support" / "rank_program.py"
ANSWERS = ROOT / "tests" / "support" / "rank_answers.py"
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PHOTO = ROOT / "examples" / "coffee.jpg"
MAX_SECONDS_TO_END = 10
SHAPE = Shape(
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    image_size=56,
)

_MARK = "NVLM_TEST_JOB"
# Open MPI refuses root and more ranks than cores; MPICH does neither and ignores these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}

needs_mpi = pytest.mark.skipif(
    MPIRUN is None, reason="no mpirun; pip install -r requirements/mpi.txt"
)


def engine_of(workshop: Workshop, tp_size: int, options: ConvertOptions) -> Path:
    """For `tp_size` ranks; three images a request."""
    model = workshop.model("model_ranks", SHAPE)
    kind = "fp8" if options is FP8 else options.dtype
    name = f"ranks_{kind}{'_fp8_head' * options.quantize_lm_head}_{tp_size}"
    checkpoint = workshop.checkpoint(f"checkpoint_{name}", model, replace(options, tp_size=tp_size))
    return workshop.engine(f"engine_{name}", checkpoint, vision="torch", max_num_images=3)


def command(num_ranks: int, *program: object) -> list[str]:
    assert MPIRUN is not None
    return [MPIRUN, "-n", str(num_ranks), sys.executable, *map(str, program)]


@contextmanager
def started(words: list[str], mark: Path) -> Iterator[subprocess.Popen[str]]:
    """A running job in a session of its own, whose processes are known by `mark`; whatever is
    left of it is killed."""
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **_OPEN_MPI, "OMP_NUM_THREADS": "1", _MARK: str(mark)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in processes_of(mark):
            os.kill(pid, 9)
        process.communicate()


def finished(
    words: list[str], mark: Path, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    with started(words, mark) as process:
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def processes_of(mark: Path) -> list[int]:
    """Processes of the job, whoever their parent is by now."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue  # it has ended, or is not ours
            if wanted in environment:
                found.append(int(entry.name))
    return found


def await_end_of_all(mark: Path, deadline: float) -> None:
    """`deadline`: of time.monotonic()."""
    while remaining := processes_of(mark):
        assert time.monotonic() < deadline, f"processes {remaining} are left of the job"
        time.sleep(0.05)
