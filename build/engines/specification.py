"""What an engine will be, decided before a byte is written: targets, precision, limits, plan."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nvlm import manifest
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.errors import UserError
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.limits import EngineLimits, derive_limits
from nvlm.plan import EnginePlan, plan_engine, vision_weight_bytes
from nvlm.vision_checkpoint import SCALES, VisionCheckpoint

log = logging.getLogger(__name__)

Decoder = Literal["torch"]
Vision = Literal["onnxruntime", "torch"]
ONNX_PRECISIONS = ("float32", "float16")
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the command line chooses; None is derived from the model."""

    decoder: Decoder | Literal["auto"] = "auto"
    vision: Vision | Literal["auto"] = "auto"
    vision_precision: str | None = None
    max_batch_size: int = 8
    max_num_images: int = 1
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class EngineSpec:
    checkpoint_dir: Path
    checkpoint: manifest.Manifest
    config: CheckpointConfig
    vision_checkpoint: VisionCheckpoint
    decoder: Decoder
    vision: Vision
    vision_precision: str
    limits: EngineLimits
    plan: EnginePlan


def specify(
    checkpoint_dir: Path,
    options: BuildOptions,
    device: torch.device,
    memory_bytes: int,
    *,
    verify: bool = False,
) -> EngineSpec:
    """Reads the checkpoint and decides. Raises `UserError` for what cannot be built.

    `auto` goes by the device the engine will run on and by its memory. `verify` hashes every file
    of the checkpoint.
    """
    read = manifest.verify_all if verify else manifest.read_manifest
    made = read(checkpoint_dir, "checkpoint")
    config = CheckpointConfig.read(checkpoint_dir / "config.json")
    checkpoint = VisionCheckpoint.read(checkpoint_dir / "vision")
    Tokenizer(checkpoint_dir / "tokenizer")  # found damaged now, not when the engine runs
    vision = _choose_vision(checkpoint, options, device, memory_bytes)
    precision = _choose_precision(checkpoint, options.vision_precision, vision)
    if options.decoder == "auto":
        log.info("decoder: torch (TensorRT-LLM engines are not built by this version)")
    limits = derive_limits(
        config.decoder,
        checkpoint.tiling,
        checkpoint.vision.tokens_per_tile,
        max_batch_size=options.max_batch_size,
        max_num_images=options.max_num_images,
        max_input_len=options.max_input_len,
        max_seq_len=options.max_seq_len,
        max_num_tokens=options.max_num_tokens,
    )
    plan = plan_engine(config, checkpoint.vision, precision, limits, device, memory_bytes)
    return EngineSpec(
        checkpoint_dir, made, config, checkpoint, "torch", vision, precision, limits, plan
    )


def _choose_vision(
    checkpoint: VisionCheckpoint, options: BuildOptions, device: torch.device, memory_bytes: int
) -> Vision:
    """`auto` is ONNX Runtime unless something speaks against it, which is logged."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if options.vision == "onnxruntime" and missing:
        raise UserError(
            f"--vision onnxruntime needs {', '.join(missing)}; pip install them or use "
            "--vision torch"
        )
    if options.vision != "auto":
        return options.vision
    graph_bytes = vision_weight_bytes(checkpoint.vision, "float32")
    sizes = f"its float32 graph has {graph_bytes / 1e9:.1f} GB"
    memory = f"half of {memory_bytes / 1e9:.1f} GB memory"
    if missing:
        against = f"{', '.join(missing)} cannot be imported"
    elif device.type != "cpu":
        against = f"it runs on {device}, where ONNX Runtime's CPU kernels do not"
    elif options.vision_precision not in (None, *ONNX_PRECISIONS):
        against = f"ONNX Runtime does not run {options.vision_precision} on a CPU"
    elif graph_bytes > memory_bytes / 2:
        against = f"{sizes}, more than {memory}"
    else:
        log.info("vision: onnxruntime (%s, at most %s)", sizes, memory)
        return "onnxruntime"
    log.info("vision: torch (%s)", against)
    return "torch"


def _choose_precision(checkpoint: VisionCheckpoint, asked: str | None, vision: Vision) -> str:
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
