"""serve.py under load, of which a part dies: what clients, probes and the program's end say."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvlm.program.command_line import EXIT_PART_DIED
from tests.faults.http_door import HttpDoor
from tests.faults.load import Load, Tally
from tests.support.command import ROOT
from tests.support.http_server import Served, serving, wait_until_ready
from tests.support.ranks import command, processes_of, started
from tests.support.sabotage import HTTP_SERVER, Sabotaged

WAIT_S = 120.0
NUM_QUESTIONS = 8
QUEUE = ("--max_queue_size", "64")  # a place for every client


@dataclass(frozen=True, slots=True)
class Death:
    """Seconds from the deed to /health being bad, and to the end of the last request in flight."""

    health: int | None  # its status then; None where nobody listened any more
    noticed_s: float
    answered_s: float
    left: list[str]  # requests that nobody had answered after `WAIT_S`
    tally: Tally


def under_load(served: Served, number: int, kill: Callable[[], None]) -> Death:
    """Kills after `number` requests. The server ends by itself."""
    load = Load(HttpDoor(served, NUM_QUESTIONS, seed=1), 1, may_go=True).start()
    load.wait_for(number)
    assert served.health() == 200, served.log.read_text()
    killed = time.monotonic()
    kill()
    health: int | None = 200
    while health == 200 and time.monotonic() < killed + WAIT_S:
        health = served.health()
    noticed_s = time.monotonic() - killed
    while load.tally.since(killed) and time.monotonic() < killed + WAIT_S:
        time.sleep(0.02)
    answered_s = time.monotonic() - killed
    left = load.tally.since(killed)
    return Death(health, noticed_s, answered_s, left, load.stop())


def sabotage_decoder(
    engine_dir: Path, folder: Path, number: int, order: str, *flags: object
) -> tuple[Death, str]:
    """And the log, which ends with code 3."""
    sabotaged = Sabotaged(folder, HTTP_SERVER)
    with serving(
        engine_dir, folder, *QUEUE, *flags, cwd=sabotaged.folder, code=EXIT_PART_DIED
    ) as served:
        death = under_load(served, number, lambda: sabotaged.order(order))
    return death, served.log.read_text()


def rank_pid(mark: Path, rank: int) -> int:
    """Finds the process of one rank of a serve.py."""
    for pid in processes_of(mark):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        names = (f"PMI_RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode())
        if b"serve.py" in words and b"mpirun" not in words and any(n in variables for n in names):
            return pid
    raise AssertionError(f"there is no rank {rank}")


def launchers_of(mark: Path) -> list[int]:
    """Processes of the job that run no Python: mpirun, and its own helpers."""
    pids = processes_of(mark)
    return [pid for pid in pids if "python" not in os.readlink(f"/proc/{pid}/exe")]


@contextmanager
def serving_on_ranks(engine_dir: Path, folder: Path) -> Iterator[Served]:
    """On two; `folder` marks the processes of the job."""
    log = folder / "serve.log"
    log.write_text("")
    flags = ("--engine_dir", engine_dir, "--device", "cpu", "--port", "0", *QUEUE)
    shell = ["/bin/sh", "-c", 'exec "$@" 2>"$0"', str(log)]
    with started([*shell, *command(2, ROOT / "serve.py", *flags)], folder) as process:
        yield wait_until_ready(process, log)


def kill_a_rank(engine_dir: Path, folder: Path, number: int) -> tuple[Death, int, str]:
    """With a launcher that sleeps, as one of a cluster that ends nobody; the leader's own exit
    status, as waitpid gives it, and the log."""
    with serving_on_ranks(engine_dir, folder) as served:
        leader, asleep = rank_pid(folder, 0), launchers_of(folder)

        def kill() -> None:
            for pid in asleep:
                os.kill(pid, signal.SIGSTOP)
            os.kill(rank_pid(folder, 1), signal.SIGKILL)

        death = under_load(served, number, kill)
        status = await_zombie(leader)
        for pid in asleep:
            os.kill(pid, signal.SIGCONT)
        served.process.wait(WAIT_S)
    return death, status, served.log.read_text()


def await_zombie(pid: int) -> int:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state == "Z":
            return int(fields[48])  # proc(5): field 52
        time.sleep(0.02)
    raise AssertionError("the leader continues")
