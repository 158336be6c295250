"""The ranks that an `mpirun` started: how they agree, and how one's failure ends them all.

MPI only brings the ranks together and ends them; tensors go through torch.distributed
(runtime/ranks/process_group.py), because MPI libraries add bfloat16 wrongly or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import torch

from nvlm.program.command_line import EXIT_PART_DIED, EXIT_USER_ERROR
from nvlm.program.errors import PartDiedError, UserError
from nvlm.program.launcher import World, end
from nvlm.program.process import die_of_sigterm
from runtime.ranks.segments import forget_segments
from runtime.ranks.watch import Watch

T = TypeVar("T")

_CAUSE_S = 3.0
_ABORT_S = 5.0  # an abort takes milliseconds; a launcher that never acts is not waited for


def visible_gpus() -> list[str]:
    """An identifier of each GPU that torch sees, the same in every process."""
    return [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]


class PeerError(RuntimeError):
    """Another rank is gone, which is the cause."""


class Job:
    """All ranks of one `mpirun`, two or more, from its start to its end.

    A context: an exception that leaves it on one rank ends every rank. Without mpi4py (TensorRT-LLM
    brings its own MPI) ranks fail one by one, as the launcher lets them.
    """

    def __init__(self, world: World) -> None:
        assert world.size > 1, "a single rank opens none of this"
        self.world = world
        self._phase, self._is_attempting = "start", False
        self._watch: Watch | None = None
        self._mpi: Any = None
        self._comm: Any = None

    def __enter__(self) -> Job:
        if importlib.util.find_spec("mpi4py") is None:
            return self
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # it looks for libmpi by itself
            reason = str(error).partition("\n")[0]
            self.refuse(
                f"mpi4py finds no MPI library ({reason}); pip install mpich, or set MPI4PY_LIBMPI "
                "to the libmpi.so of the mpirun in use"
            )
        if MPI.COMM_WORLD.size != self.world.size:
            self.refuse(
                f"the launcher started {self.world.size} ranks but mpi4py sees "
                f"{MPI.COMM_WORLD.size}: it belongs to another MPI library; use the mpirun of the "
                "one that mpi4py loads"
            )
        self._mpi, self._comm = MPI, MPI.COMM_WORLD
        sys.excepthook = self._fail  # a rank that ended alone would leave the others waiting
        is_one_machine = self.world.local_size == self.world.size
        offer = Watch.start(self.world.size, is_one_machine) if self.world.rank == 0 else None
        offer = self._comm.bcast(offer)
        assert offer is not None
        # Which waits for every rank.
        self._watch = Watch.join(offer, self.world.rank, EXIT_PART_DIED)
        forget_segments()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_reported = isinstance(error, UserError | PartDiedError | OSError)
        if isinstance(error, Exception) and not is_reported:
            return  # `_fail` says where
        if error is not None:
            self._abort()
        elif self._comm is not None:
            self._comm.Barrier()
            self.watch.leave()
            self._mpi.Finalize()  # all did their work: from here on each ends alone (see `end`)

    @property
    def has_mpi(self) -> bool:
        return self._comm is not None

    @property
    def watch(self) -> Watch:
        assert self._watch is not None
        return self._watch

    def has_lost_rank(self) -> bool:
        """Whether another rank died; this one ends soon."""
        return self._watch is not None and self._watch.has_lost_rank

    def phase(self, name: str) -> None:
        """What this rank does from now on, for the message when it dies."""
        if name != self._phase:
            self._phase = name
            if self._watch is not None:
                self._watch.phase(name)

    def broadcast(self, value: T) -> T:
        """The leader's value, on every rank."""
        assert not self._is_attempting, "a rank whose attempt failed is elsewhere"
        return value if self._comm is None else self._comm.bcast(value)

    def gather(self, value: T) -> list[T]:
        """Every rank's value in rank order, on every rank."""
        assert not self._is_attempting, "a rank whose attempt failed is elsewhere"
        return [value] if self._comm is None else self._comm.allgather(value)

    def agree(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, which must not speak to other ranks. Where it raises `UserError`
        on any rank, only the lowest such rank raises it, and the others end without a word."""
        error: UserError | None = None
        self._is_attempting = True
        try:
            result = attempt()
        except UserError as problem:
            error = problem
        finally:
            self._is_attempting = False
        failed = [rank for rank, is_bad in enumerate(self.gather(error is not None)) if is_bad]
        if not failed or (error is not None and not self.has_mpi):
            if error is not None:
                raise error
            return result
        if failed[0] == self.world.rank and error is not None:
            raise error
        self.watch.leave()
        time.sleep(_ABORT_S)
        os._exit(EXIT_USER_ERROR)

    def device(self, device: torch.device) -> torch.device:
        """Collective. This rank's GPU, or the CPU. Raises `UserError` for fewer GPUs than ranks."""
        if device.type != "cuda":
            return device
        everyones = self.gather(visible_gpus())
        return self.agree(lambda: torch.device("cuda", self.world.gpu(everyones)))

    def refuse(self, message: str) -> NoReturn:
        """For a mistake that every rank of a machine finds while they cannot speak to one another:
        raises `UserError` on the first of them, the others end without a word."""
        if self.world.local_rank > 0:
            sys.exit(EXIT_USER_ERROR)
        raise UserError(message)

    def require_equal(self, what: str, value: str, expected: str, remedy: str) -> None:
        """Raises `UserError` on a rank whose `value` is not the leader's, `expected`."""
        if value != expected:
            raise UserError(
                f"on {platform.node()} is {what} {value}, rank 0 has {expected}; {remedy}"
            )

    def _fail(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """An error of ours: the traceback, which rank and where, then the end of all."""
        if isinstance(error, PeerError):  # the rank that failed says why, and ends this one
            die_of_sigterm()
            time.sleep(_CAUSE_S)
        traceback.print_exception(kind, error, trace)
        print(f"rank {self.world.rank} failed in phase {self._phase}", file=sys.stderr)
        self._abort()
        end(1)

    def _abort(self) -> None:
        """Call this before `end` with a code other than 0."""
        if self._watch is not None:
            self._watch.abort()
