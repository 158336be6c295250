"""Which target an engine is built for: what was asked for, or what `auto` finds, and why."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from nvlm import tensorrt_llm_package, tensorrt_package
from nvlm.errors import UserError
from nvlm.plan import vision_weight_bytes
from nvlm.vision_checkpoint import SCALES, VisionCheckpoint

log = logging.getLogger(__name__)

Auto = Literal["auto"]
Decoder = Literal["torch", "tensorrt_llm"]
Vision = Literal["onnxruntime", "torch", "tensorrt", "tensorrt_rtx"]
AUTO: Auto = "auto"

ONNX_PRECISIONS = ("float32", "float16")
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_EXPORT_PACKAGES = ("onnx", "onnxscript")
_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class TargetMachine:
    """Where the engine will run."""

    device: torch.device
    memory_bytes: int

    @property
    def is_hopper(self) -> bool:
        if self.device.type != "cuda" or not torch.cuda.is_available():
            return False
        return torch.cuda.get_device_capability(self.device) == _HOPPER


def choose_decoder(asked: Decoder | Auto, machine: TargetMachine) -> Decoder:
    if asked == "tensorrt_llm":
        _require_gpu("--decoder tensorrt_llm", "--decoder torch")
        return asked
    if asked != AUTO:
        return asked
    if not machine.is_hopper:
        against = f"{machine.device} is no Hopper GPU"
    elif not tensorrt_llm_package.is_installed():
        against = "tensorrt_llm is not installed"
    else:
        log.info("decoder: tensorrt_llm (it is installed and the GPU is Hopper)")
        return "tensorrt_llm"
    log.info("decoder: torch (%s)", against)
    return "torch"


def choose_vision(
    asked: Vision | Auto,
    checkpoint: VisionCheckpoint,
    machine: TargetMachine,
    *,
    precision: str | None,
    compute_capability: str | None,
) -> Vision:
    """`auto` is TensorRT on Hopper where it is installed, ONNX Runtime on a CPU unless something
    speaks against it, else torch."""
    if asked == "onnxruntime":
        _require_packages("onnxruntime", _ONNX_PACKAGES)
    if asked in tensorrt_package.PACKAGES:
        _require_packages(asked, _EXPORT_PACKAGES)
        if asked == "tensorrt" or compute_capability is None:
            mend = "--vision torch"
            if asked == "tensorrt_rtx":
                mend += " or name the GPU it is for with --compute_capability"
            _require_gpu(f"--vision {asked}", mend)
    if asked != AUTO:
        return asked
    if machine.is_hopper and tensorrt_package.is_installed("tensorrt"):
        log.info("vision: tensorrt (it is installed and the GPU is Hopper)")
        return "tensorrt"
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    graph_bytes = vision_weight_bytes(checkpoint.vision, "float32")
    sizes = f"its float32 graph has {graph_bytes / 1e9:.1f} GB"
    memory = f"half of {machine.memory_bytes / 1e9:.1f} GB memory"
    if missing:
        against = f"{', '.join(missing)} cannot be imported"
    elif machine.device.type != "cpu":
        against = f"it runs on {machine.device}, where ONNX Runtime's CPU kernels do not"
    elif precision not in (None, *ONNX_PRECISIONS):
        against = f"ONNX Runtime does not run {precision} on a CPU"
    elif graph_bytes > machine.memory_bytes / 2:
        against = f"{sizes}, more than {memory}"
    else:
        log.info("vision: onnxruntime (%s, at most %s)", sizes, memory)
        return "onnxruntime"
    log.info("vision: torch (%s)", against)
    return "torch"


def choose_precision(checkpoint: VisionCheckpoint, asked: str | None, vision: Vision) -> str:
    if vision == "onnxruntime" and asked not in (None, *ONNX_PRECISIONS):
        raise UserError(
            f"--vision_precision {asked} is not for --vision onnxruntime, expected "
            f"{' or '.join(ONNX_PRECISIONS)}; use --vision torch"
        )
    if asked == "FP8" and not checkpoint.has_scales:
        raise UserError(
            f"{checkpoint.directory} has no {SCALES}, which --vision_precision FP8 needs; "
            "convert with --quant_algo FP8"
        )
    return asked or ("float32" if vision == "onnxruntime" else checkpoint.dtype)


def _require_packages(vision: str, packages: tuple[str, ...]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--vision {vision} needs {', '.join(missing)}; pip install them or use --vision torch"
        )


def _require_gpu(flag: str, mend: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"{flag} builds on the GPU it is for, but torch sees none here; use {mend}")
