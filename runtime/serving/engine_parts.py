"""Loads what runs an engine: vision and decoder, on this rank of all."""

from __future__ import annotations

import hashlib
import platform
from functools import partial
from pathlib import Path

import torch

import nvlm
from nvlm.formats import layout
from nvlm.program.errors import UserError
from runtime.decoder.executor import (
    DecoderExecutor,
    DecoderOptions,
    create_decoder_executor,
    require_ranks_supported,
)
from runtime.engine.engine_dir import EngineDir
from runtime.engine.engine_packages import require_packages
from runtime.ranks.mpi import Job, require_world_size
from runtime.ranks.parallel_vision import ParallelVisionExecutor
from runtime.ranks.process_group import ProcessGroup
from runtime.vision.executor import VisionExecutor, create_vision_executor


def open_engine(engine_dir: Path, device: torch.device, job: Job) -> EngineDir:
    """Reads an engine that these ranks can run. Raises `UserError`, on one rank, if they cannot."""
    job.phase("load")

    def read() -> EngineDir:
        engine = EngineDir.read(engine_dir)
        require_ranks_supported(engine)
        config = engine.checkpoint_config
        require_world_size(job.world, config.tp_size, config.pp_size)
        require_packages(engine, device)
        return engine

    engine = job.agree(read)
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


def open_parts(
    engine: EngineDir, device: torch.device, job: Job, options: DecoderOptions | None = None
) -> tuple[VisionExecutor, DecoderExecutor]:
    """Only rank 0 sees images where the decoder's ranks are TensorRT-LLM's."""
    is_parallel = job.world.size > 1 and engine.decoder_target == "torch"
    group = ProcessGroup(job, device) if is_parallel else None

    def load_vision() -> VisionExecutor:
        if engine.decoder_target == "torch":
            _require_current(device)
        return create_vision_executor(engine, device)

    def load_decoder() -> DecoderExecutor:
        return create_decoder_executor(engine, device, options, group)

    vision = job.agree(load_vision)
    if group is None:
        return vision, job.agree(load_decoder)
    vision = ParallelVisionExecutor(vision, group, engine.tiling.image_size)
    return vision, load_decoder()  # whose ranks agree step by step


def _require_current(device: torch.device) -> None:
    """Triton's kernels run on a thread's current GPU, whatever their tensors are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return
    raise UserError(
        f"{device} is not the process's current GPU (cuda:{torch.cuda.current_device()}); start it "
        f"with CUDA_VISIBLE_DEVICES={device.index} and give the device as cuda"
    )
