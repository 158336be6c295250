"""What an engine will be, decided before a byte is written: targets, precision, limits, plan."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from build.engines.decoder_tensorrt_llm import DEFAULT_OPTIMIZE_FOR, OptimizeFor, plugin_config
from build.engines.kv_cache import KVCacheDtype, KVCacheScales, choose_kv_cache
from build.engines.target import (
    AUTO,
    Auto,
    TargetMachine,
    choose_decoder,
    choose_precision,
    choose_vision,
    require_precision,
    require_used,
)
from nvlm.formats import layout, manifest
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.scale_dtype import scale_dtype, what_differs
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.planning import targets, tensorrt_package
from nvlm.planning.limits import EngineLimits, derive_limits
from nvlm.planning.memory_plan import EnginePlan, plan_engine, plan_tensorrt_llm
from nvlm.planning.targets import Decoder, Vision
from nvlm.planning.tensorrt_llm_package import load_tensorrt_llm
from nvlm.planning.tensorrt_package import PACKAGES, load_tensorrt
from nvlm.program.errors import UserError

log = logging.getLogger(__name__)

MAX_TILES_PER_PASS = 56
"""Eight images of seven tiles: 57,400 rows keep any GPU busy, and activations grow with more."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What the command line chooses; None is derived from the model or the machine."""

    decoder: Decoder | Auto = AUTO  # what runs the decoder; auto: what this machine can
    vision: Vision | Auto = AUTO  # what runs vision; auto: what this machine can
    vision_precision: str | None = None  # a type or FP8
    max_batch_size: int = 8  # requests in a step
    max_num_images: int = 1  # images of a request
    max_input_len: int | None = None  # tokens of a prompt
    max_seq_len: int | None = None  # tokens of prompt and answer
    max_num_tokens: int | None = None  # tokens that a step computes
    # What keys and values are held in; auto: as the checkpoint says.
    kv_cache_dtype: KVCacheDtype = "auto"
    kv_cache_scales: KVCacheScales = "one"  # one for K and V, or one each
    optimize_for: OptimizeFor = DEFAULT_OPTIMIZE_FOR  # what decoder tensorrt_llm is tuned for
    # Of another GPU than this machine's, such as "8.9", for tensorrt_rtx.
    compute_capability: str | None = None
    keep_onnx: bool = False  # leave the exported ONNX in the engine


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that an engine will be, once nothing is left to choose."""

    checkpoint_dir: Path  # where the weights are
    checkpoint: manifest.Manifest  # its manifest
    config: CheckpointConfig  # of the decoder, with the engine's own KV cache
    vision_checkpoint: VisionCheckpoint  # of vision
    decoder: Decoder  # target of the decoder
    vision: Vision  # target of vision
    vision_precision: str  # a type or FP8
    limits: EngineLimits  # what requests may hold
    plan: EnginePlan  # the memory that it takes
    max_num_tiles: int  # tiles of the largest pass of vision
    packages: dict[str, str]  # versions of what the engine depends on; it runs with no others


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
    config = CheckpointConfig.read(checkpoint_dir / layout.CONFIG)
    vision_checkpoint = VisionCheckpoint.read(checkpoint_dir / layout.VISION)
    Tokenizer(checkpoint_dir / layout.TOKENIZER)  # found damaged now, not when the engine runs
    machine = TargetMachine(device, memory_bytes)
    kv_cache = choose_kv_cache(
        options.kv_cache_dtype, options.kv_cache_scales, config, checkpoint_dir
    )
    config = replace(config, kv_cache=kv_cache)
    decoder = choose_decoder(options.decoder, machine, config)
    vision = choose_vision(
        options.vision,
        vision_checkpoint,
        machine,
        precision=options.vision_precision,
        compute_capability=options.compute_capability,
    )
    if decoder == "tensorrt_llm":
        older = what_differs(checkpoint_dir, scale_dtype(checkpoint_dir, config), config)
        if older is not None:
            log.warning(older)
    if options.compute_capability is not None:
        require_used("--compute_capability", decoder, vision)
    if options.keep_onnx:
        require_used("--keep_onnx", decoder, vision)
    precision = choose_precision(
        vision_checkpoint, options.vision_precision, vision, config.quant_algo
    )
    packages = _packages(decoder, vision, device, options.compute_capability)
    if vision in PACKAGES:
        require_precision(vision, precision, packages["compute_capability"])
    limits = derive_limits(
        config.decoder,
        vision_checkpoint.tiling,
        vision_checkpoint.config.tokens_per_tile,
        max_batch_size=options.max_batch_size,
        max_num_images=options.max_num_images,
        max_input_len=options.max_input_len,
        max_seq_len=options.max_seq_len,
        max_num_tokens=options.max_num_tokens,
    )
    if options.max_num_tokens is not None and limits.max_num_tokens < options.max_num_tokens:
        log.info(
            "--max_num_tokens %d is clipped to %d: --max_batch_size %d times --max_seq_len %d",
            *(options.max_num_tokens, limits.max_num_tokens),
            *(limits.max_batch_size, limits.max_seq_len),
        )
    tiles_per_image = vision_checkpoint.tiling.max_tiles_per_image
    max_num_tiles = max(
        tiles_per_image, min(limits.max_batch_size * tiles_per_image, MAX_TILES_PER_PASS)
    )
    if decoder == "tensorrt_llm":
        plugin_config(config, options.optimize_for)  # refused now, not after vision is built
        plan = plan_tensorrt_llm(
            config, vision_checkpoint.config, precision, limits, max_num_tiles, memory_bytes
        )
    else:
        plan = plan_engine(
            config, vision_checkpoint.config, precision, limits, device, memory_bytes
        )
    return EngineSpec(
        checkpoint_dir=checkpoint_dir,
        checkpoint=made,
        config=config,
        vision_checkpoint=vision_checkpoint,
        decoder=decoder,
        vision=vision,
        vision_precision=precision,
        limits=limits,
        plan=plan,
        max_num_tiles=max_num_tiles,
        packages=packages,
    )


def require_fit(spec: EngineSpec, memory_bytes: int) -> None:
    """Refuses an engine that could not be loaded where it takes hours to build."""
    plan = spec.plan
    if spec.decoder != "tensorrt_llm" or plan.fits(memory_bytes):
        return
    needed = plan.total_bytes - plan.kv_cache_bytes
    needed += plan.limits.max_seq_len * plan.kv_bytes_per_token
    parts = {
        "weights": plan.decoder_weight_bytes,
        "vision": plan.vision_weight_bytes,
        "prompt table": plan.prompt_table_bytes,
        "workspace": plan.workspace_bytes,
    }
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    raise UserError(
        f"a rank needs {needed / 1e9:.1f} GB ({listed}, and a KV cache for one request) but its "
        f"GPU has {memory_bytes / 1e9:.1f} GB; convert with a larger --tp_size or lower "
        "--max_batch_size, --max_num_images or --max_num_tokens"
    )


def _packages(
    decoder: Decoder, vision: Vision, device: torch.device, compute_capability: str | None
) -> dict[str, str]:
    packages: dict[str, str] = {}
    if vision in PACKAGES:
        trt = load_tensorrt(vision)
        packages[vision] = str(trt.__version__)
        if compute_capability is not None:
            tensorrt_package.compute_capability(trt, compute_capability)  # refused now, not later
    if decoder == "tensorrt_llm":
        packages["tensorrt_llm"] = str(load_tensorrt_llm().__version__)
        packages["tensorrt"] = str(load_tensorrt("tensorrt").__version__)
    if packages:
        packages["compute_capability"] = compute_capability or targets.compute_capability(device)
    return packages
