"""Runs an entry script on every rank that a launcher started: rank 0 leads, the others work.

The only place that imports runtime/ranks, and only where there are several ranks.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvlm.planning.memory_plan import KV_CACHE_FREE_GPU_MEMORY_FRACTION
from nvlm.program.command_line import (
    ArgumentParser,
    fraction,
    natural_float,
    positive_int,
    resolve_device,
)
from nvlm.program.launcher import World
from runtime.decoder.executor import SERVICE_STEP_MS, DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.engine.libraries import set_up_libraries
from runtime.engine.mapped_files import MappedFiles
from runtime.serving.engine_parts import for_answers
from runtime.serving.runner import Runner

Lead = Callable[[torch.device, Callable[[], Runner]], int]
"""What rank 0 does, or the only one: takes the device and what opens its runner there, returns the
exit code."""

Add = Callable[..., Any]
"""`add_argument` of a parser or a group."""


@dataclass(frozen=True, slots=True)
class Program:
    """What a command line asks of every rank."""

    engine_dir: Path  # as the user gave it
    device: str  # auto, cpu or cuda
    options: DecoderOptions  # the same on all: each rank of TensorRT-LLM allocates by its own
    lead: Lead  # what rank 0 does; the others follow it


def add_engine_flags(parser: ArgumentParser, *, is_service: bool = False) -> None:
    """The flags that say which engine runs, on what and how. is_service: answers are streamed to
    people who wait for each token."""
    add = parser.add_argument_group("engine").add_argument
    add_place_flags(add)
    add(
        "--kv_cache_free_gpu_memory_fraction",
        type=fraction,
        metavar="SHARE",
        help="share of the GPU memory left after loading that the KV cache takes (default: "
        f"{KV_CACHE_FREE_GPU_MEMORY_FRACTION} for decoder tensorrt_llm; what the limits can use "
        "for decoder torch)",
    )
    add_step_flag(add, is_service=is_service)


def add_place_flags(add: Add) -> None:
    """The flags that say which engine runs, and where."""
    add("--engine_dir", type=Path, required=True, help="engine directory, made by build_engine.py")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the engine runs; auto: the GPU, if there is one",
    )


def add_queue_flag(add: Add) -> None:
    """The flag of both servers that bounds what waits."""
    add(
        "--max_queue_size",
        type=positive_int,
        default=64,
        metavar="N",
        help="requests that may wait, beside those in the batch",
    )


def add_step_flag(add: Add, *, is_service: bool) -> None:
    default = f"{SERVICE_STEP_MS:g} on a GPU, else 0" if is_service else "0"
    add(
        "--max_step_ms",
        type=natural_float,
        default=None if is_service else 0.0,
        metavar="MS",
        help="milliseconds that a step may take while a request decodes in it; longer prompts are "
        "cut into chunks, pictures are encoded in slices of 3/8 of it, and 0 is no bound "
        f"(decoder torch; default: {default})",
    )


def engine_options(
    arguments: Namespace, *, gather_logits: bool = False, num_answers: int | None = None
) -> DecoderOptions:
    """What `add_engine_flags` read, and what the program will ask for."""
    return DecoderOptions(
        arguments.kv_cache_free_gpu_memory_fraction,
        gather_logits,
        arguments.max_step_ms,
        num_answers,
    )


def launch(environment: MutableMapping[str, str], parse: Callable[[], Program]) -> int:
    """Parses the command line on every rank and returns the exit code.

    environment: os.environ of the entry script; the launcher's variables are read from it, those of
    libraries are set in it. Raises `UserError` for a mistake, of several ranks on one.
    """
    world = World.from_environment(environment)
    if world.size > 1:
        return _launch_rank(world, environment, parse)
    program = parse()
    device = resolve_device(program.device)
    return program.lead(
        device, lambda: Runner.open(program.engine_dir, device, program.options, environment)
    )


def _launch_rank(
    world: World, environment: MutableMapping[str, str], parse: Callable[[], Program]
) -> int:
    from runtime.ranks.mpi import Job
    from runtime.ranks.open_parts import open_engine_on_ranks, open_parts_on_ranks, work

    with Job(world) as job:
        program = job.agree(parse)
        device = job.device(job.agree(lambda: resolve_device(program.device)))
        if "OMP_NUM_THREADS" not in environment:
            torch.set_num_threads(world.share_of(torch.get_num_threads()))

        def read_engine() -> EngineDir:
            engine = open_engine_on_ranks(program.engine_dir, device, job)
            engine = for_answers(engine, device, program.options.num_answers)
            set_up_libraries(engine, device, environment)
            return engine

        def open_runner() -> Runner:
            engine = read_engine()
            mapped = MappedFiles.of(engine, device)
            vision, decoder = open_parts_on_ranks(engine, device, job, program.options)
            return Runner(engine, vision, decoder, device, mapped, has_lost_rank=job.has_lost_rank)

        if world.rank == 0:
            return program.lead(device, open_runner)
        work(read_engine(), device, job, program.options)
        return 0
