"""How a job of several ranks ends: killed, failed, interrupted, or started wrongly."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import FP8, FP32, Workshop
from tests.support.command import RUN, one_line_error, run_process
from tests.support.ranks import (
    MAX_SECONDS_TO_END,
    PHOTO,
    PROGRAM,
    ROOT,
    await_end_of_all,
    command,
    engine_of,
    finished,
    needs_mpi,
    started,
)

pytestmark = [needs_mpi, pytest.mark.mpi]

QUESTION = ("--image", PHOTO, "--prompt", "hi", "--max_new_tokens", 4)


@pytest.fixture(scope="module")
def engine(workshop: Workshop) -> Path:
    return engine_of(workshop, 2, FP32)


@pytest.fixture(scope="module")
def ahead_engine(workshop: Workshop) -> Path:
    """An engine of the fast path, whose steps are in flight."""
    return engine_of(workshop, 2, FP8)


def job(
    engine: Path, mark: Path, what: str, *flags: object, num_ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    """Ends, and nothing is left of it."""
    words = command(num_ranks, PROGRAM, what, "--engine_dir", engine, *QUESTION, *flags)
    with started(words, mark) as process:
        stdout, stderr = process.communicate(timeout=120)
        await_end_of_all(mark, time.monotonic() + MAX_SECONDS_TO_END)
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "error: " in line]


@pytest.mark.parametrize("phase", ["load", "vision", "prefill", "decode"])
def test_a_killed_rank_ends_all_in_time_and_is_named_with_its_phase(
    engine: Path, tmp_path: Path, phase: str
) -> None:
    result = job(engine, tmp_path, f"kill={phase}")
    ended = time.monotonic()
    assert result.returncode != 0
    assert f"rank 1 died in phase {phase}; ending the others" in result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    killed = re.search(r"killed at ([\d.]+)", result.stderr)
    assert killed is not None
    assert ended - float(killed[1]) < MAX_SECONDS_TO_END


def test_a_failed_rank_shows_its_traceback_and_phase_and_nobody_else_is_named(
    engine: Path, tmp_path: Path
) -> None:
    result = job(engine, tmp_path, "raise=prefill")
    assert result.returncode == 1
    assert "RuntimeError: the test's failure" in result.stderr, result.stderr
    assert "rank 1 failed in phase prefill" in result.stderr
    assert result.stderr.count("Traceback") == 1
    assert "died" not in result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_with_a_step_in_flight_ends_all_in_time_and_is_named(
    ahead_engine: Path, tmp_path: Path, rank: int
) -> None:
    """It has the next step's message and has not launched it."""
    result = job(ahead_engine, tmp_path, f"ahead:kill=decode@{rank}")
    ended = time.monotonic()
    assert result.returncode != 0
    assert f"rank {rank} died in phase decode; ending the others" in result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    killed = re.search(r"killed at ([\d.]+)", result.stderr)
    assert killed is not None
    assert ended - float(killed[1]) < MAX_SECONDS_TO_END


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_with_a_step_in_flight_says_why_and_ends_all(
    ahead_engine: Path, tmp_path: Path, rank: int
) -> None:
    result = job(ahead_engine, tmp_path, f"ahead:raise=decode@{rank}")
    assert result.returncode == 1
    assert "RuntimeError: the test's failure" in result.stderr, result.stderr
    assert f"rank {rank} failed in phase decode" in result.stderr
    assert result.stderr.count("Traceback") == 1
    assert "died" not in result.stderr


@pytest.mark.parametrize(
    ("num_ranks", "what", "flags", "message"),
    [
        (3, "", (), "tp_size=2, pp_size=1 but 3 ranks are running; use mpirun -n 2"),
        (
            2,
            "version=9.9",
            (),
            f"rank 1: error: on {platform.node()} is nvlm-engine 9.9, rank 0",
        ),
        (2, "gpus=1", ("--device", "cuda"), "2 ranks run on this machine and torch sees 1 GPU"),
        (2, "", ("--top_k", "-1"), "top_k is -1"),
    ],
    ids=["wrong -n", "other version", "fewer GPUs", "only the leader finds it"],
)
def test_a_mistake_is_reported_once_in_one_line(
    engine: Path,
    tmp_path: Path,
    num_ranks: int,
    what: str,
    flags: tuple[str, ...],
    message: str,
) -> None:
    result = job(engine, tmp_path, what, *flags, num_ranks=num_ranks)
    assert result.returncode == 2
    assert result.stdout.strip() == ""
    (line,) = errors(result.stderr)
    assert message in line
    assert "Traceback" not in result.stderr
    assert "died" not in result.stderr


@pytest.mark.parametrize(("rank", "named"), [(0, "error: "), (1, "rank 1: error: ")])
def test_a_rank_whose_cache_does_not_fit_says_so_and_nobody_else(
    engine: Path, tmp_path: Path, rank: int, named: str
) -> None:
    result = job(engine, tmp_path, f"memory={rank}")
    assert result.returncode == 2
    (line,) = errors(result.stderr)
    assert line.startswith(f"{named}the KV cache of {engine} takes 0.0 GB of cpu's 0.0 GB; build ")
    assert "died" not in result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_of_another_mpi_library_is_reported_by_the_first_rank(
    engine: Path, rank: int
) -> None:
    """Then mpi4py takes every process for one that was started alone."""
    environment = {"PMI_SIZE": "2", "PMI_RANK": str(rank)}
    flags = ("--engine_dir", engine, "--prompt", "hi")
    result = run_process(RUN, *flags, environment=environment)
    assert result.exit_code == 2
    if rank == 0:
        one_line_error(result, "the launcher started 2 ranks but mpi4py sees 1")
    else:
        assert result.stderr == ""


@pytest.mark.parametrize(
    ("signal_number", "what"),
    [
        (signal.SIGINT, ""),
        (signal.SIGTERM, ""),
        (signal.SIGINT, "ahead:"),
        (signal.SIGTERM, "ahead:"),
    ],
    ids=["^C", "SIGTERM", "^C ahead", "SIGTERM ahead"],
)
def test_an_interrupted_job_ends_every_rank_and_says_so_once(
    engine: Path, ahead_engine: Path, tmp_path: Path, signal_number: int, what: str
) -> None:
    """A terminal sends Control-C to the launcher's group, a scheduler SIGTERM to the launcher."""
    engine = ahead_engine if what else engine
    requests = tmp_path / "in.jsonl"
    requests.write_text('{"prompt": "hi", "max_new_tokens": 9}\n' * 5000)
    output = tmp_path / "out.jsonl"
    flags = ("--engine_dir", engine, "--input_file", requests, "--output_file", output)
    with started(command(2, PROGRAM, what, *flags), tmp_path) as process:
        deadline = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if signal_number == signal.SIGINT:
            os.killpg(process.pid, signal_number)
        else:
            process.send_signal(signal_number)
        _, stderr = process.communicate(timeout=MAX_SECONDS_TO_END)
        await_end_of_all(tmp_path, time.monotonic() + MAX_SECONDS_TO_END)
    assert process.returncode != 0
    assert "Traceback" not in stderr, stderr
    assert "died" not in stderr, stderr
    assert stderr.count("interrupted") <= 1, stderr  # a launcher may drop rank 0's last words


def test_a_batch_with_a_failed_line_ends_with_1_and_without_an_abort(
    engine: Path, tmp_path: Path
) -> None:
    """Also under `python -m mpi4py`."""
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"prompt": "hi", "max_new_tokens": 2}\n{"promt": "hi"}\n')
    flags = ("--engine_dir", engine, "--input_file", requests, "--output_file", output)
    words = command(2, "-m", "mpi4py", ROOT / "run.py", *flags)
    result = finished(words, tmp_path)
    assert result.returncode == 1, result.stderr
    assert "2 requests, 1 failed" in result.stderr
    assert len(output.read_text().splitlines()) == 2
