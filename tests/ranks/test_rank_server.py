"""A server on ranks of which one dies or stops: noticed, reported, and nothing runs without it."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvlm.program.command_line import EXIT_PART_DIED
from tests.conftest import FP32, Workshop
from tests.support.ranks import (
    MAX_SECONDS_TO_END,
    ROOT,
    await_end_of_all,
    command,
    engine_of,
    needs_mpi,
    processes_of,
    started,
)

pytestmark = [needs_mpi, pytest.mark.mpi]

PROGRAM = ROOT / "tests" / "support" / "rank_server.py"
HANG_AFTER_S = 10


def worker_of(mark: Path) -> int:
    """Rank 1 of the job."""
    for pid in processes_of(mark):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if {b"PMI_RANK=1", b"OMPI_COMM_WORLD_RANK=1"} & set(environment) and (
            str(PROGRAM).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        ):
            return pid
    raise AssertionError("there is no rank 1")


@dataclass(frozen=True, slots=True)
class Ended:
    """seconds: from the signal to the end of the job."""

    returncode: int
    stderr: str
    seconds: float


def after_signal(workshop: Workshop, mark: Path, number: signal.Signals) -> Ended:
    """What a job under load says when rank 1 got a signal; nothing of it is left."""
    engine = engine_of(workshop, 2, FP32)
    flags = ("--engine_dir", engine, "--device", "cpu", "--hang_after_s", HANG_AFTER_S)
    words = command(2, PROGRAM, *flags)
    lines: list[str] = []
    is_ready = threading.Event()
    with started(words, mark) as process:
        assert process.stderr is not None

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if "ready" in line:
                    is_ready.set()
            is_ready.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert is_ready.wait(120)
        assert process.poll() is None, "".join(lines)
        worker, begun = worker_of(mark), time.monotonic()
        os.kill(worker, number)
        process.wait(120)
        seconds = time.monotonic() - begun
        reader.join(60)
        await_end_of_all(mark, time.monotonic() + MAX_SECONDS_TO_END)
    return Ended(process.returncode, "".join(lines), seconds)


def test_a_killed_rank_ends_the_server_and_is_named(workshop: Workshop, tmp_path: Path) -> None:
    result = after_signal(workshop, tmp_path, signal.SIGKILL)
    assert result.returncode != 0
    assert "rank 1 died in phase" in result.stderr


@pytest.mark.slow
def test_a_stopped_rank_hangs_the_decoder_and_its_clients_get_an_error(
    workshop: Workshop, tmp_path: Path
) -> None:
    """Nobody waits for it: neither clients, nor the launcher, nor the runner that is closed."""
    result = after_signal(workshop, tmp_path, signal.SIGSTOP)
    assert result.returncode == EXIT_PART_DIED, result.stderr
    assert "4 clients got the error" in result.stderr
    message = "error: the decoder's thread has made no progress for 10 s"
    assert message in result.stderr
    assert "died in phase" not in result.stderr, "rank 1 died of the end of the others"
