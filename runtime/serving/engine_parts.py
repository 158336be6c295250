"""Loads what runs an engine on one rank: vision and decoder. Several ranks: runtime/ranks."""

from __future__ import annotations

from dataclasses import replace

import torch

from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderExecutor, DecoderOptions, create_decoder_executor
from runtime.engine.engine_dir import EngineDir
from runtime.vision.executor import VisionExecutor, create_vision_executor

_SLICE_SHARE = 3 / 8
"""A slice of vision takes this share of a step's bound. The rest is a decode step's: with 8 rows it
takes 20 of 33 ms on an H200. Decision 147 (docs/decisions/serving.md)."""


def for_answers(engine: EngineDir, device: torch.device, num_answers: int | None) -> EngineDir:
    """The engine with no room for more answers at once, where they are all on a GPU: less is made
    at load, and no bit of them is another."""
    limits = engine.limits
    if num_answers is None or engine.decoder_target != "torch" or device.type != "cuda":
        return engine
    most = min(num_answers, limits.max_batch_size)
    return replace(engine, limits=replace(limits, max_batch_size=most))


def open_parts(
    engine: EngineDir, device: torch.device, options: DecoderOptions | None = None
) -> tuple[VisionExecutor, DecoderExecutor]:
    """Vision first: the decoder's KV cache takes its share of what is then free."""
    if engine.decoder_target == "torch":
        _require_current(device)
    vision = create_vision_executor(
        engine,
        device,
        vision_slice_ms(engine, device, options),
        use_graphs=options is None or options.num_answers is None,
    )
    return vision, create_decoder_executor(engine, device, options)


def vision_slice_ms(
    engine: EngineDir, device: torch.device, options: DecoderOptions | None
) -> float:
    """Milliseconds that a slice of vision may take between two steps; 0 is no slices.

    TensorRT-LLM's steps run on streams of their own, so nothing has to come between them."""
    if options is None or engine.decoder_target != "torch":
        return 0.0
    return _SLICE_SHARE * options.step_bound_ms(device)


def _require_current(device: torch.device) -> None:
    """Triton's kernels run on a thread's current GPU, whatever their tensors are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return
    raise UserError(
        f"{device} is not the process's current GPU (cuda:{torch.cuda.current_device()}); start it "
        f"with CUDA_VISIBLE_DEVICES={device.index} and give the device as cuda"
    )
