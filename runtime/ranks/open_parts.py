"""Loads an engine on all ranks of a job, and does a worker's part until the leader closes.

With decoder torch the ranks are ours: each loads its shard and the leader sends every step. With
TensorRT-LLM they are its own, and rank 0 alone sees images.
"""

from __future__ import annotations

import hashlib
import platform
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

import nvlm
from nvlm.formats import layout
from runtime.decoder.executor import DecoderExecutor, DecoderOptions, create_decoder_executor
from runtime.decoder.tensorrt_llm_executor import TensorrtLlmDecoderExecutor
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on
from runtime.engine.open_engine import open_engine
from runtime.ranks.mpi import Job
from runtime.ranks.parallel_decoder import open_parallel_model
from runtime.ranks.parallel_vision import ParallelVisionExecutor
from runtime.ranks.process_group import ProcessGroup
from runtime.vision.executor import VisionExecutor, create_vision_executor


def open_engine_on_ranks(engine_dir: Path, device: torch.device, job: Job) -> EngineDir:
    """Collective. Raises `UserError`, on one rank, for an engine that these ranks cannot run, or
    that is not the leader's."""
    job.phase("load")
    engine = job.agree(lambda: open_engine(engine_dir, device, job.world.size))
    manifest = (engine.directory / layout.MANIFEST).read_bytes()
    for what, value, remedy in (
        ("nvlm-engine", nvlm.__version__, "install the same version on every machine"),
        ("Python", platform.python_version(), "use the same version on every machine"),
        ("torch", torch.__version__, "install the same version on every machine"),
        (
            f"an {engine.directory} whose manifest's SHA-256 is",
            hashlib.sha256(manifest).hexdigest()[:16],
            "copy the same engine directory to every machine",
        ),
    ):
        job.agree(partial(job.require_equal, what, value, job.broadcast(value), remedy))
    return engine


def open_parts_on_ranks(
    engine: EngineDir, device: torch.device, job: Job, options: DecoderOptions
) -> tuple[VisionExecutor, DecoderExecutor]:
    """Collective, on the leader: its part, which leads the workers'."""
    if engine.decoder_target == "torch":
        return open_parts_of_group(engine, device, ProcessGroup(job, device), options)
    vision = job.agree(lambda: create_vision_executor(engine, device))
    return vision, job.agree(lambda: create_decoder_executor(engine, device, options))


def work(engine: EngineDir, device: torch.device, job: Job, options: DecoderOptions) -> None:
    """Collective, on a worker: loads its part and works until the leader closes. Requests,
    tokenizer and answers are the leader's."""
    assert job.world.rank > 0
    if engine.decoder_target == "torch":
        group = ProcessGroup(job, device)
        open_parts_of_group(engine, device, group, options)
        job.phase("waiting for work")
        answers_once = options.num_answers is not None  # no step was tried at load
        with loading_on(device, engine, "answering") if answers_once else nullcontext():
            group.follow()
        return
    _, decoder = open_parts_on_ranks(engine, device, job, options)
    assert isinstance(decoder, TensorrtLlmDecoderExecutor)
    job.phase("waiting for work")
    decoder.work()


def open_parts_of_group(
    engine: EngineDir,
    device: torch.device,
    group: ProcessGroup,
    options: DecoderOptions | None = None,
) -> tuple[VisionExecutor, TorchDecoderExecutor]:
    """Collective. On a worker they are what `group.follow` runs."""
    options = options or DecoderOptions()
    answers_once = options.num_answers is not None
    own = group.job.agree(
        lambda: create_vision_executor(engine, device, use_graphs=not answers_once)
    )
    vision = ParallelVisionExecutor(own, group, engine.tiling.image_size)
    cache_fraction = options.kv_cache_free_gpu_memory_fraction
    model = open_parallel_model(
        engine, device, group, cache_fraction=cache_fraction, answers_once=answers_once
    )
    decoder = TorchDecoderExecutor.over(engine, model)
    if group.rank == 0:  # the workers run the steps that are measured once they follow
        with loading_on(device, engine):
            decoder.bound_steps(options.step_bound_ms(device), device)
    return vision, decoder
