"""The ranks that an `mpirun` started: which this is, and how one's failure ends them all.

MPI only brings the ranks together and ends them; tensors go through torch.distributed
(runtime/process_group.py), because MPI libraries add bfloat16 wrongly or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch

from nvlm.errors import UserError
from runtime.watch import Watch

T = TypeVar("T")

EXIT_USER_ERROR = 2
_CAUSE_S = 3.0
_FORWARD_S = 0.2  # a launcher that aborts drops what it has not yet read of our output
_ABORT_S = 5.0  # an abort takes milliseconds; a launcher that never acts is not waited for

# (size, rank, local size, local rank) as Open MPI, and as MPICH and others with PMI, set them.
_VARIABLES = (
    (
        *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True, slots=True)
class World:
    """`local_rank` counts the ranks of one machine, `local_size` of them; None where the launcher
    does not say, which is then taken as one machine."""

    size: int = 1
    rank: int = 0
    local_size_given: int | None = None
    local_rank_given: int | None = None

    @property
    def local_size(self) -> int:
        return self.size if self.local_size_given is None else self.local_size_given

    @property
    def local_rank(self) -> int:
        return self.rank if self.local_rank_given is None else self.local_rank_given

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> World:
        for size, rank, local_size, local_rank in _VARIABLES:
            if size in environment:
                values = environment[size], environment.get(rank, "0")
                local = [environment.get(name) for name in (local_size, local_rank)]
                if not all(value is None or value.isdecimal() for value in (*values, *local)):
                    raise UserError(
                        f"{size}={values[0]} and {rank}={values[1]} in the environment, expected "
                        "numbers; start with mpirun, or unset them"
                    )
                numbers = [None if value is None else int(value) for value in local]
                return cls(int(values[0]), int(values[1]), *numbers)
        return cls()

    def device(self, device: torch.device) -> torch.device:
        """This rank's GPU, or the CPU. Raises `UserError` for fewer GPUs than ranks."""
        if device.type != "cuda" or self.size == 1:
            return device
        if (num_gpus := torch.cuda.device_count()) < self.local_size:
            raise UserError(
                f"{self.local_size} ranks run on this machine and torch sees {num_gpus} GPUs; use "
                "as many GPUs as ranks, or --device cpu"
            )
        return torch.device("cuda", self.local_rank)


def rank_from(environment: Mapping[str, str]) -> int:
    """For the log, which must not fail: 0 where the environment says nothing sensible."""
    try:
        return World.from_environment(environment).rank
    except UserError:
        return 0


def require_world_size(world: World, tp_size: int, pp_size: int) -> None:
    """Raises `UserError` unless as many ranks run as the engine was built for."""
    expected = tp_size * pp_size
    if world.size != expected:
        raise UserError(
            f"engine_dir was built for tp_size={tp_size}, pp_size={pp_size} but {world.size} "
            f"ranks are running; use mpirun -n {expected}"
        )


class PeerError(RuntimeError):
    """Another rank is gone, which is the cause."""


class Job:
    """All ranks of one `mpirun`, from its start to its end; alone it does nothing.

    A context: an exception that leaves it on one rank ends every rank. Without mpi4py (TensorRT-LLM
    brings its own MPI) ranks fail one by one, as the launcher lets them.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._phase = "start"
        self._watch: Watch | None = None
        self._mpi: Any = None
        self._comm: Any = None
        if world.size > 1 and importlib.util.find_spec("mpi4py") is not None:
            from mpi4py import MPI

            self._mpi, self._comm = MPI, MPI.COMM_WORLD

    def __enter__(self) -> Job:
        if self._comm is None:
            return self
        if self._comm.size != self.world.size:
            found, size = self._comm.size, self.world.size
            self._comm = None
            raise UserError(
                f"the launcher started {size} ranks but mpi4py sees {found}: it belongs to another "
                "MPI library; use the mpirun of the one that mpi4py loads"
            )
        is_leader = self.world.rank == 0
        offer = Watch.start(self.world.size) if is_leader else None
        offer = self._comm.bcast(offer)
        assert offer is not None
        self._watch = Watch.join(offer, self.world.rank, self.world.local_size == self.world.size)
        sys.excepthook = self._fail
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, Exception) and not issubclass(kind, UserError):
            return  # `_fail` tells where
        if kind is None and self._comm is not None:
            self._comm.Barrier()
        self._leave()

    @property
    def has_mpi(self) -> bool:
        return self._comm is not None

    @property
    def watch(self) -> Watch:
        assert self._watch is not None
        return self._watch

    def phase(self, name: str) -> None:
        """What this rank does from now on, for the message when it dies."""
        if name != self._phase:
            self._phase = name
            if self._watch is not None:
                self._watch.phase(name)

    def broadcast(self, value: T) -> T:
        """The leader's value, on every rank."""
        return value if self._comm is None else self._comm.bcast(value)

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on every rank."""
        return [value] if self._comm is None else self._comm.allgather(value)

    def agree(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns. Where it raises `UserError` on any rank, only the lowest such
        rank raises it, and the others end without a word."""
        error: UserError | None = None
        try:
            result = attempt()
        except UserError as problem:
            error = problem
        failed = [rank for rank, is_bad in enumerate(self.gather(error is not None)) if is_bad]
        if not failed or (error is not None and not self.has_mpi):
            if error is not None:
                raise error
            return result
        if failed[0] == self.world.rank and error is not None:
            raise error
        self._leave()
        time.sleep(_ABORT_S)
        os._exit(EXIT_USER_ERROR)

    def require_equal(self, what: str, value: str, expected: str, remedy: str) -> None:
        """Raises `UserError` on a rank whose `value` is not the leader's, `expected`."""
        if value != expected:
            raise UserError(
                f"rank {self.world.rank} has {what} {value}, rank 0 has {expected}; {remedy}"
            )

    def _fail(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """An error of ours: the traceback, which rank and where, then the end of all."""
        if isinstance(error, PeerError):
            time.sleep(_CAUSE_S)  # the rank that failed tells why, and ends this one
        traceback.print_exception(kind, error, trace)
        print(f"rank {self.world.rank} failed in phase {self._phase}", file=sys.stderr)
        self._leave()
        end(1)

    def _leave(self) -> None:
        if self._watch is not None:
            self._watch.leave()


def end(code: int) -> NoReturn:
    """Ends this process with `code`; other than 0 ends every rank, and mpirun returns it."""
    mpi = sys.modules.get("mpi4py.MPI")
    if code != 0 and mpi is not None and mpi.COMM_WORLD.size > 1:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        time.sleep(_FORWARD_S)
        mpi.COMM_WORLD.Abort(code)
    sys.exit(code)
