"""How many ranks an `mpirun` started and which one this is, without initialising MPI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nvlm.errors import UserError

# (size, rank) as Open MPI, and as MPICH and every other launcher that speaks PMI, set them.
_VARIABLES = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))


@dataclass(frozen=True, slots=True)
class World:
    size: int = 1
    rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> World:
        for size, rank in _VARIABLES:
            if size in environment:
                values = environment[size], environment.get(rank, "0")
                if not all(value.isdecimal() for value in values):
                    raise UserError(
                        f"{size}={values[0]} and {rank}={values[1]} in the environment, expected "
                        "numbers; start with mpirun, or unset them"
                    )
                return cls(int(values[0]), int(values[1]))
        return cls()


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
