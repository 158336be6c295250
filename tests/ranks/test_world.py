"""Which rank this is, by what the launchers say, and the GPU that it takes."""

from __future__ import annotations

import socket

import pytest

from nvlm.program.errors import UserError
from nvlm.program.launcher import World, rank_from
from runtime.engine.open_engine import require_world_size
from runtime.ranks.watch import Offer, Watch


def mpich(size: int, rank: int, local_size: int, local_rank: int) -> dict[str, str]:
    """Variables of mpirun -n 1 env, MPICH 5.0.2."""
    names = ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID")
    return dict(zip(names, map(str, (size, rank, local_size, local_rank)), strict=True))


def open_mpi(size: int, rank: int, local_size: int, local_rank: int) -> dict[str, str]:
    """Variables of mpirun -n 1 env, Open MPI 4.1.4 and 5.0.11."""
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    values = zip(names, (size, rank, local_size, local_rank), strict=True)
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values}


def slurm(size: int, rank: int, local_size: int, local_rank: int) -> dict[str, str]:
    """Variables of a task of `srun --mpi=pmix`, as Slurm's manual lists them."""
    return {
        "SLURM_NTASKS": "99",  # the allocation's, not this step's
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": f"{local_size}(x{size // local_size})",
        "SLURM_NODEID": str(rank // local_size),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local_rank),
        "PMIX_RANK": str(rank),
    }


@pytest.mark.parametrize("launcher", [mpich, open_mpi, slurm])
def test_the_second_rank_of_the_second_machine_takes_its_second_gpu(
    launcher: object,
) -> None:
    assert callable(launcher)
    world = World.from_environment(launcher(4, 3, 2, 1))
    assert (world.size, world.rank, world.local_size, world.local_rank) == (4, 3, 2, 1)
    assert world.gpu([["a", "b"]] * 4) == 1
    assert world.share_of(8) == 4
    assert world.share_of(1) == 1


def test_a_rank_that_sees_a_gpu_of_its_own_takes_it() -> None:
    """As SLURM gives one to each task: there is no second one to number."""
    assert World.from_environment(mpich(2, 1, 2, 1)).gpu([["a"], ["b"]]) == 0
    assert World.from_environment(mpich(2, 1, 1, 0)).gpu([["a"], ["b"]]) == 0
    uneven = [["a", "b"], ["a", "b"], ["c"]]
    assert [World(3, rank, 2, rank).gpu(uneven) for rank in (0, 1)] == [0, 1]
    assert World(3, 2, 1, 0).gpu(uneven) == 0


@pytest.mark.parametrize("visible", [[["a"]], [["a"], ["a"]], [["a"], []], [["a", "b"], ["b"]]])
def test_fewer_gpus_than_ranks_of_a_machine_are_refused(visible: list[list[str]]) -> None:
    message = f"2 ranks run on this machine and torch sees {len(visible[-1])} GPU"
    with pytest.raises(UserError, match=message):
        World.from_environment(mpich(2, 1, 2, 1)).gpu(visible)


def test_without_a_launcher_there_is_one_rank() -> None:
    world = World.from_environment({})
    assert (world.size, world.rank, world.local_size, world.local_rank) == (1, 0, 1, 0)
    require_world_size(world.size, 1, 1)
    with pytest.raises(UserError, match="tp_size=4, pp_size=2 but 1 rank"):
        require_world_size(world.size, 4, 2)


def test_variables_that_are_no_numbers_are_refused_and_the_log_does_without() -> None:
    environment = {"PMI_SIZE": "two", "PMI_RANK": "0"}
    with pytest.raises(UserError, match="PMI_SIZE=two"):
        World.from_environment(environment)
    assert rank_from(environment) == 0


@pytest.mark.parametrize(("size", "rank"), [("0", "0"), ("2", "2")])
def test_a_rank_outside_the_world_is_refused(size: str, rank: str) -> None:
    with pytest.raises(UserError, match=f"PMI_SIZE={size} and PMI_RANK={rank}.*below the size"):
        World.from_environment({"PMI_SIZE": size, "PMI_RANK": rank})


def test_slurms_uneven_machines_are_counted() -> None:
    uneven = {**slurm(5, 4, 2, 0), "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    world = World.from_environment(uneven)
    assert (world.size, world.rank, world.local_size, world.local_rank) == (5, 4, 1, 0)


def test_a_shell_of_slurm_and_a_task_without_mpi_are_one_rank() -> None:
    """A batch script has Slurm's variables too; shares of a benchmark are tasks of their own."""
    task = slurm(4, 3, 2, 1)
    del task["PMIX_RANK"]
    assert World.from_environment(task).size == 1


def test_a_launcher_that_does_not_say_its_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"PMIX_RANK=1 .*no SLURM_STEP_NUM_TASKS.*mpirun or srun"):
        World.from_environment({"PMIX_RANK": "1"})


def torchrun(size: int, rank: int) -> dict[str, str]:
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return dict(zip(names, map(str, (size, rank, rank, size)), strict=True))


def test_torchrun_is_refused_by_name_unless_it_started_one() -> None:
    with pytest.raises(UserError, match=r"torchrun .*started 4 processes.*mpirun -n 4"):
        World.from_environment(torchrun(4, 2))
    assert rank_from(torchrun(4, 2)) == 2
    assert World.from_environment(torchrun(1, 0)).size == 1
    assert World.from_environment({**torchrun(4, 2), **mpich(4, 2, 4, 2)}).rank == 2
    assert World.from_environment({"WORLD_SIZE": "4"}).size == 1, "left by something else"
    assert World.from_environment({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""}).size == 1
    with pytest.raises(UserError, match=r"launcher of torch\.distributed\) started 2 processes"):
        World.from_environment({"WORLD_SIZE": "2", "RANK": "0"})  # a pod of Kubeflow's


def test_mvapichs_variables_are_read() -> None:
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    values = dict(zip((f"MV2_COMM_WORLD_{name}" for name in names), "4321", strict=True))
    assert World.from_environment({**values, "MV2_COMM_WORLD_LOCAL_RANK": "1"}) == World(4, 3, 2, 1)


def test_a_rank_that_cannot_reach_the_first_one_says_where_it_looked() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"reaches rank 0 at none .*127.0.0.1.*port {port}"):
        Watch.join(Offer(("127.0.0.1",), port), 1, 3)
