"""The other ranks of an `mpirun`, as forked processes, and what MPI carries between Executors.

The leader's waits until every rank has opened its engine with the leader's settings, sends them
each step and that it closes, and hears from each. A rank that is missing, dead or out of step is
an error: a real run would hang.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.support.modules import importable

_TIMEOUT_S = 60
OPEN, STEP, CLOSE = "open", "step", "close"


@dataclass(slots=True)
class Leader:
    """Rank 0's side."""

    pipes: list[Connection] = field(default_factory=list)
    rank: int = 0
    num_steps: int = 0

    def open(self, gathers_logits: bool) -> None:
        self._hear((OPEN, gathers_logits))

    def step(self) -> None:
        self.num_steps += 1
        self._send(STEP)

    def close(self) -> None:
        self._send(CLOSE)

    def _send(self, word: str) -> None:
        for pipe in self.pipes:
            pipe.send(word)
        self._hear(word)

    def _hear(self, word: object) -> None:
        for rank, pipe in enumerate(self.pipes, start=1):
            if not pipe.poll(_TIMEOUT_S):
                raise RuntimeError(f"rank {rank} does not answer")
            try:
                found = pipe.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} has ended") from None
            assert found == (word, rank), f"rank {rank} says {found}, expected {word}"


@dataclass(slots=True)
class Worker:
    """Another rank's side."""

    rank: int
    pipe: Connection

    def open(self, gathers_logits: bool) -> None:
        self.pipe.send(((OPEN, gathers_logits), self.rank))

    def serve(self) -> None:
        """Its part of every step, until the leader closes."""
        word = None
        while word != CLOSE:
            word = self.pipe.recv()
            self.pipe.send((word, self.rank))


@dataclass(frozen=True, slots=True)
class Rank:
    process: BaseProcess
    log: Path

    @property
    def printed(self) -> str:
        """Its stdout and stderr."""
        return self.log.read_text()


@contextmanager
def mpirun(
    executor: Any, size: int, work: Callable[[int], None], folder: Path
) -> Iterator[list[Rank]]:
    """This process is rank 0 inside the block; the others do `work(rank)` and must have ended by
    themselves with exit code 0 soon after its end."""
    context = multiprocessing.get_context("fork")  # they need the doubles, which live in here
    leader, ranks = Leader(), []
    with (
        patch.dict(os.environ, OMPI_COMM_WORLD_SIZE=str(size), OMPI_COMM_WORLD_RANK="0"),
        patch.object(executor, "ranks", leader if size > 1 else None),
        importable({"mpi4py": None}),  # there is no launcher that it could speak to
    ):
        for rank in range(1, size):
            ours, theirs = context.Pipe()
            log = folder / f"rank{rank}.log"
            process = context.Process(target=_run, args=(executor, rank, theirs, work, log))
            process.start()
            theirs.close()
            leader.pipes.append(ours)
            ranks.append(Rank(process, log))
        try:
            yield ranks
            for rank in ranks:
                rank.process.join(_TIMEOUT_S)
                assert rank.process.exitcode == 0, rank.printed
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.join()


def _run(
    executor: Any, rank: int, pipe: Connection, work: Callable[[int], None], log: Path
) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["OMPI_COMM_WORLD_RANK"] = str(rank)
    executor.ranks = Worker(rank, pipe)
    work(rank)
