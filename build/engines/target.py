"""Which target an engine is built for: what was asked for, or what `auto` finds, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.kv_cache import AS_STORED
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.vision import VISION_FORMAT
from nvlm.planning.memory_plan import vision_weight_bytes
from nvlm.planning.targets import (
    Decoder,
    Machine,
    Vision,
    in_one_line,
    missing_for_decoder,
    missing_for_vision,
)
from nvlm.program.errors import UserError

log = logging.getLogger(__name__)

Auto = Literal["auto"]
AUTO: Auto = "auto"

ONNX_PRECISIONS = ("float32", "float16")

_LEAST_CAPABILITY = {VISION_FORMAT.name: (8, 9), "bfloat16": (8, 0)}
"""The first compute capability whose tensor cores multiply in this precision: Ada, and Ampere."""

_FLAG_TARGETS = {
    "--compute_capability": ("--vision tensorrt_rtx",),
    "--keep_onnx": ("--vision tensorrt", "--vision tensorrt_rtx"),
    "--timing_cache": ("--vision tensorrt", "--decoder tensorrt_llm"),  # RTX times nothing ahead
    "--optimize_for": ("--decoder tensorrt_llm",),
    "--workers": ("--decoder tensorrt_llm",),
}
"""Flags of build_engine.py that do something for these targets alone."""


@dataclass(frozen=True, slots=True)
class TargetMachine:
    """The device and its memory on which the engine will run."""

    device: torch.device  # a CPU or a GPU
    memory_bytes: int  # of the device, or as --memory_gb says

    @property
    def machine(self) -> Machine:
        return Machine.of(self.device)


def choose_decoder(
    asked: Decoder | Auto, target: TargetMachine, config: CheckpointConfig
) -> Decoder:
    """Decoder torch alone mixes FP8 linears with others, and a checkpoint with other KV caches."""
    if config.exclude_modules:
        if asked == "tensorrt_llm":
            raise UserError(
                "--decoder tensorrt_llm takes a checkpoint whose linears are all FP8, found "
                f"--exclude_modules {config.exclude_modules[0]}; use --decoder torch, or convert "
                "without"
            )
        log.info("decoder: torch (the checkpoint excludes linears from FP8)")
        return "torch"
    if config.kv_cache != AS_STORED:
        if asked == "tensorrt_llm":
            own = config.kv_cache.scales
            flag = "--kv_cache_scales own" if own else f"--kv_cache_dtype {config.dtype}"
            fix = "leave it out" if own else "convert with --kv_cache_quant_algo none"
            raise UserError(
                "--decoder tensorrt_llm has the KV cache that the checkpoint says, found "
                f"{flag}; use --decoder torch, or {fix}"
            )
        log.info("decoder: torch (the KV cache is not as the checkpoint says)")
        return "torch"
    if asked != AUTO:
        if missing := missing_for_decoder(asked, target.machine):
            raise UserError(
                f"--decoder {asked} is not possible here: {in_one_line(missing)}; "
                "or use --decoder torch"
            )
        return asked
    if missing := missing_for_decoder("tensorrt_llm", target.machine):
        log.info("decoder: torch (%s)", "; ".join(each.what for each in missing))
        return "torch"
    log.info("decoder: tensorrt_llm (it is installed and the GPU is Hopper)")
    return "tensorrt_llm"


def choose_vision(
    asked: Vision | Auto,
    checkpoint: VisionCheckpoint,
    target: TargetMachine,
    *,
    precision: str | None,
    compute_capability: str | None,
) -> Vision:
    """`auto` is TensorRT on Hopper where it is installed, ONNX Runtime on a CPU unless something
    speaks against it, else torch."""
    machine = target.machine
    if asked != AUTO:
        if asked == "tensorrt_rtx" and compute_capability is not None:
            machine = Machine(is_cross=True)
        if missing := missing_for_vision(asked, machine):
            raise UserError(
                f"--vision {asked} is not possible here: {in_one_line(missing)}; "
                "or use --vision torch"
            )
        return asked
    if machine.has_hopper and not missing_for_vision("tensorrt", machine):
        log.info("vision: tensorrt (it is installed and the GPU is Hopper)")
        return "tensorrt"
    graph_bytes = vision_weight_bytes(checkpoint.config, "float32")
    sizes = f"its float32 graph has {graph_bytes / 1e9:.1f} GB"
    memory = f"half of {target.memory_bytes / 1e9:.1f} GB memory"
    if missing := missing_for_vision("onnxruntime", machine):
        against = "; ".join(each.what for each in missing)
    elif target.device.type != "cpu":
        against = f"it runs on {target.device}, where ONNX Runtime's CPU kernels do not"
    elif precision not in (None, *ONNX_PRECISIONS):
        against = f"ONNX Runtime does not run {precision} on a CPU"
    elif graph_bytes > target.memory_bytes / 2:
        against = f"{sizes}, more than {memory}"
    else:
        log.info("vision: onnxruntime (%s, at most %s)", sizes, memory)
        return "onnxruntime"
    log.info("vision: torch (%s)", against)
    return "torch"


def require_used(flag: str, decoder: Decoder, vision: Vision) -> None:
    """Refuses a flag that would do nothing for the targets chosen."""
    chosen = (f"--decoder {decoder}", f"--vision {vision}")
    if not set(chosen) & set(_FLAG_TARGETS[flag]):
        raise UserError(
            f"{flag} needs {' or '.join(_FLAG_TARGETS[flag])}, and this engine gets "
            f"{' and '.join(chosen)}; leave it out or choose another target"
        )


def choose_precision(
    checkpoint: VisionCheckpoint, asked: str | None, vision: Vision, quant_algo: str | None
) -> str:
    """quant_algo: the decoder's. Raises `UserError` for a precision that vision cannot have."""
    if vision == "onnxruntime" and asked not in (None, *ONNX_PRECISIONS):
        raise UserError(
            f"--vision_precision {asked} is not for --vision onnxruntime, expected "
            f"{' or '.join(ONNX_PRECISIONS)}; use --vision torch"
        )
    if asked == VISION_FORMAT.name and not checkpoint.has_scales:
        remedy = f"convert with --quant_algo {asked}"
        if quant_algo == asked:
            remedy = (
                "its calibration samples held no picture; convert with --calib_data that holds some"
            )
        raise UserError(
            f"{checkpoint.directory} has no {layout.SCALES}, which --vision_precision {asked} "
            f"needs: {remedy}"
        )
    return asked or ("float32" if vision == "onnxruntime" else checkpoint.dtype)


def require_precision(vision: Vision, precision: str, capability: str) -> None:
    """Raises `UserError` where a GPU of this compute capability, as "8.9", has no `precision`."""
    found = tuple(map(int, capability.split(".")))
    least = _LEAST_CAPABILITY.get(precision, (0, 0))
    if found >= least:
        return
    held = [name for name, needed in _LEAST_CAPABILITY.items() if found >= needed]
    raise UserError(
        f"--vision {vision} in {precision} needs compute capability {least[0]}.{least[1]} or more, "
        f"and the engine is for {capability}; use --vision_precision "
        f"{' or '.join([*held, 'float16'])}"
    )
