"""Which rank of an MPI launcher's job this process is, and how it ends with the others.

Data alone: a process that was started without a launcher is rank 0 of one, and opens nothing of
runtime/ranks.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from nvlm.program.errors import UserError

_FORWARD_S = 0.2  # a launcher that aborts drops what it has not yet read of our output

# (size, rank, local size, local rank) as Open MPI, as MPICH and others with PMI, and as MVAPICH2's
# mpirun_rsh set them.
_VARIABLES = (
    (
        *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    (
        *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        *("MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ),
)
# `srun --mpi=pmix` alone gives its tasks PMIX_RANK too. The third is a list: "2(x3),1".
_SLURM = ("SLURM_STEP_NUM_TASKS", "PMIX_RANK", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID")
_SLURM_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_TORCH_DISTRIBUTED = ("WORLD_SIZE", "RANK")


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a job and this one's place."""

    size: int = 1  # ranks of the job
    rank: int = 0  # this one, from 0
    # Ranks on this machine. None: the launcher does not say, and all count as on one.
    local_size_given: int | None = None
    local_rank_given: int | None = None  # this one among those on its machine; None as above

    @property
    def local_size(self) -> int:
        return self.size if self.local_size_given is None else self.local_size_given

    @property
    def local_rank(self) -> int:
        return self.rank if self.local_rank_given is None else self.local_rank_given

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> World:
        """Raises `UserError` for variables that make no sense, and for launchers without MPI."""
        for names in _VARIABLES:
            if names[0] in environment:
                return cls._read(environment, names)
        if "PMIX_RANK" in environment:
            return cls._read(_of_slurm(environment), _SLURM)
        _refuse_torchrun(environment)
        return cls()

    @classmethod
    def _read(cls, environment: Mapping[str, str], names: tuple[str, str, str, str]) -> World:
        size, rank, *local_names = names
        values = environment[size], environment.get(rank, "0")
        local = [environment.get(name) for name in local_names]
        if not all(value is None or value.isdecimal() for value in (*values, *local)):
            raise UserError(
                f"{size}={values[0]} and {rank}={values[1]} in the environment, expected numbers; "
                "start with mpirun, or unset them"
            )
        world = cls(
            *(int(value) for value in values),
            *(None if value is None else int(value) for value in local),
        )
        if world.rank >= world.size:
            raise UserError(
                f"{size}={world.size} and {rank}={world.rank} in the environment, expected a rank "
                "below the size; start with mpirun, or unset them"
            )
        return world

    def share_of(self, num_threads: int) -> int:
        """How many of a machine's threads each of its ranks takes."""
        return max(1, num_threads // self.local_size)

    def gpu(self, visible: Sequence[Sequence[str]]) -> int:
        """The index of the GPU that this rank takes, among those `visible` to each rank (or to
        this one alone). It is the local rank; 0 where the launcher shows every rank another GPU
        (`srun --gpus-per-task 1`). Raises `UserError` for fewer GPUs than ranks."""
        ones = {gpus[0] for gpus in visible if len(gpus) == 1}
        if len(ones) == self.size:
            return 0
        num_gpus = len(visible[self.rank if len(visible) == self.size else 0])
        if num_gpus < self.local_size:
            raise UserError(
                f"{self.local_size} ranks run on this machine and torch sees {num_gpus} GPU"
                f"{'' if num_gpus == 1 else 's'}; use as many GPUs as ranks, or --device cpu"
            )
        return self.local_rank


def _of_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with the number of this machine's tasks in place of Slurm's list of all."""
    size, rank, local_size, _ = _SLURM
    if size not in environment:
        raise UserError(
            f"{rank}={environment[rank]} in the environment and no {size}: a launcher that does "
            "not say how many ranks it started; start with mpirun or srun --mpi=pmix, or unset it"
        )
    found = dict(environment)
    counts: list[str] = []
    for part in environment.get(local_size, "").split(","):
        count = _SLURM_COUNT.fullmatch(part)
        counts += [count[1]] * int(count[2] or 1) if count else []
    node = environment.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        found[local_size] = counts[int(node)]
    else:
        found.pop(local_size, None)
    return found


def _refuse_torchrun(environment: Mapping[str, str]) -> None:
    """Its processes could not find each other, and each would answer everything."""
    size, rank = (environment.get(name, "") for name in _TORCH_DISTRIBUTED)
    if size not in ("", "1") and rank:
        raise UserError(
            f"torchrun (or another launcher of torch.distributed) started {size} processes, and "
            f"ranks meet by MPI here; start with mpirun -n {size} python ..., or one process"
        )


def rank_from(environment: Mapping[str, str]) -> int:
    """For the log, which must not fail: where the environment makes no sense, what torchrun says,
    or 0."""
    try:
        return World.from_environment(environment).rank
    except UserError:
        rank = environment.get("RANK", "")
        return int(rank) if rank.isdecimal() else 0


def end(code: int) -> NoReturn:
    """Ends this process with `code`. Where it is a rank of several that still work together, any
    code but 0 ends every rank, and mpirun returns it."""
    mpi = sys.modules.get("mpi4py.MPI")
    if code != 0 and mpi is not None and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        time.sleep(_FORWARD_S)
        mpi.COMM_WORLD.Abort(code)
    sys.exit(code)
