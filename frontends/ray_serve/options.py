"""What a command line asks for: replicas, and each one's serve.py with its flags. Opens no Ray."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontends.openai import flags as server_flags
from nvlm.program.command_line import ArgumentParser, natural_int, positive_float, positive_int
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir

LOCAL = "local"
"""The address of a cluster that the program starts for itself."""
_SERVER = Path(__file__).resolve().parents[2] / "serve.py"
_TARGET_OF_BATCH = 0.7
"""Share of a batch's places that scaling fills. The rest answers bursts (docs/scaling.md)."""
_MOST_CALLS_BESIDE = 256
"""serve.py itself refuses what is more than its queue, long before Ray would hold it back."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line chooses."""

    command: tuple[str, ...]  # of each replica's process
    min_replicas: int  # least number of replicas
    max_replicas: int  # largest number; equal to the least: it does not change
    num_ingresses: int  # processes that route
    num_gpus: int  # of each replica
    num_cpus: int  # of each replica
    spill_at: int  # open requests from which a replica's own go to the least loaded
    max_open: int  # requests that a replica may hold at once
    target_ongoing_requests: float  # open requests a replica that scaling aims at
    upscale_delay_s: float  # seconds of more load before a replica is added
    downscale_delay_s: float  # seconds of less load before one is removed
    drain_s: float  # seconds in which a replica that is removed may end its answers
    arguments: argparse.Namespace  # serve.py's, which hold at the ingress too

    @property
    def is_autoscaled(self) -> bool:
        return self.max_replicas > self.min_replicas


def parser() -> ArgumentParser:
    """serve.py's flags and those of the replicas."""
    made = server_flags.parser(
        "Serves an engine directory with replicas of serve.py on a Ray cluster, at one address.",
        "python -m frontends.ray_serve",
    )
    _add_flags(made)
    return made


def read_options(flags: Sequence[str], num_cluster_gpus: float) -> Options:
    """Raises `UserError` for flags that make no sense, and for an engine that is none.

    num_cluster_gpus: with none, and without --num_gpus, replicas run on the CPU.
    """
    arguments = parser().parse_args(flags)
    if arguments.port == 0:
        raise UserError("--port is 0, expected the one port of Ray's proxies; give one, as in 8000")
    _make_absolute(arguments)
    own = ArgumentParser("")
    _add_flags(own)
    _, of_server = own.parse_known_args(flags)
    engine = EngineDir.read(arguments.engine_dir)
    num_ranks = engine.checkpoint_config.world_size
    num_gpus = arguments.num_gpus
    if num_gpus is None:
        uses_gpu = arguments.device == "cuda" or (arguments.device == "auto" and num_cluster_gpus)
        num_gpus = num_ranks if uses_gpu else 0
    if num_gpus not in (0, num_ranks):
        raise UserError(
            f"--num_gpus is {num_gpus}, expected {num_ranks}, one for each rank of "
            f"{arguments.engine_dir}, or 0 for the CPU; convert with another --tp_size for others"
        )
    minimum = arguments.min_replicas or arguments.num_replicas
    maximum = arguments.max_replicas or max(minimum, arguments.num_replicas)
    if not minimum <= maximum:
        raise UserError(
            f"--max_replicas is {maximum}, expected {minimum} or more, which is the least; "
            "give a larger one"
        )
    batch = engine.limits.max_batch_size
    return Options(
        command=(*_launcher(num_ranks), *_server_command(arguments, of_server)),
        min_replicas=minimum,
        max_replicas=maximum,
        num_ingresses=arguments.num_ingresses,
        num_gpus=num_gpus,
        num_cpus=arguments.num_cpus,
        spill_at=batch,
        max_open=batch + arguments.max_queue_size + _MOST_CALLS_BESIDE,
        target_ongoing_requests=arguments.target_ongoing_requests or _TARGET_OF_BATCH * batch,
        upscale_delay_s=arguments.upscale_delay_s,
        downscale_delay_s=arguments.downscale_delay_s,
        drain_s=arguments.drain_s,
        arguments=arguments,
    )


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """The command line of a config file's `args`: a switch is true, and a list has the values of
    one flag. false and null leave a flag out."""
    flags: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        flags += [f"--{name}", *map(str, values)]
    return flags


def _add_flags(parser: ArgumentParser) -> None:
    add = parser.add_argument_group(
        "replicas", "A replica is a serve.py with an engine of its own."
    ).add_argument
    add(
        "--address",
        default=LOCAL,
        help="address of the Ray cluster; local starts a Ray on this machine, auto joins the one "
        "that runs here",
    )
    add(
        "--num_replicas",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of replicas to start",
    )
    add(
        "--min_replicas",
        type=positive_int,
        metavar="N",
        help="fewest replicas when they are scaled by load (default: --num_replicas)",
    )
    add(
        "--max_replicas",
        type=positive_int,
        metavar="N",
        help="most replicas when they are scaled by load (default: --num_replicas, or a larger "
        "--min_replicas)",
    )
    add(
        "--target_ongoing_requests",
        type=positive_float,
        metavar="N",
        help="open requests of a replica that scaling aims at (default: 0.7 of the engine's batch)",
    )
    add(
        "--upscale_delay_s",
        type=positive_float,
        default=30.0,
        metavar="SECONDS",
        help="seconds of too much load after which a replica is added",
    )
    add(
        "--downscale_delay_s",
        type=positive_float,
        default=600.0,
        metavar="SECONDS",
        help="seconds of too little load after which a replica is removed",
    )
    add(
        "--num_gpus",
        type=natural_int,
        metavar="N",
        help="GPUs of each replica: one for each rank of its engine, or 0 for the CPU (default: "
        "one a rank if the cluster has GPUs, else 0)",
    )
    add(
        "--num_cpus",
        type=natural_int,
        default=1,
        metavar="N",
        help="CPUs that Ray reserves for each replica",
    )
    add(
        "--num_ingresses",
        type=positive_int,
        default=2,
        metavar="N",
        help="processes that route requests to replicas",
    )


def _launcher(num_ranks: int) -> tuple[str, ...]:
    if num_ranks == 1:
        return ()
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise UserError(
            f"the engine has {num_ranks} ranks and there is no mpirun; "
            "pip install -r requirements/mpi.txt"
        )
    return found, "-n", str(num_ranks)


def _make_absolute(arguments: argparse.Namespace) -> None:
    """Ingresses and replicas start in other folders."""
    arguments.engine_dir = arguments.engine_dir.resolve()
    if arguments.api_key_file is not None:
        arguments.api_key_file = arguments.api_key_file.resolve()
    if arguments.access_log not in ("-", "none"):
        arguments.access_log = str(Path(arguments.access_log).resolve())


def _server_command(arguments: argparse.Namespace, flags: Sequence[str]) -> tuple[str, ...]:
    """The last of a flag counts."""
    paths = ["--engine_dir", str(arguments.engine_dir), "--access_log", arguments.access_log]
    if arguments.api_key_file is not None:
        paths += ["--api_key_file", str(arguments.api_key_file)]
    own = ["--host", "127.0.0.1", "--port", "0"]
    return (sys.executable, str(_SERVER), *flags, *paths, *own)
