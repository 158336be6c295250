"""Step 2 on one page: checkpoint directory -> engine directory."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from build.engines.files import link_or_copy
from build.engines.vision_onnx import export_vision
from nvlm import __version__, manifest
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.checkpoint_tensors import decoder_tensors, open_checked
from nvlm.errors import UserError
from nvlm.json_files import write_json_atomically
from nvlm.limits import EngineLimits, derive_limits
from nvlm.output_dir import staged_directory
from nvlm.plan import EnginePlan, plan_engine, vision_weight_bytes
from nvlm.vision_checkpoint import SCALES, WEIGHTS, VisionCheckpoint

log = logging.getLogger(__name__)

Decoder = Literal["torch"]
Vision = Literal["onnxruntime", "torch"]
ONNX_PRECISIONS = ("float32", "float16")


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
    """Everything decided before a byte is written."""

    checkpoint_dir: Path
    config: CheckpointConfig
    vision_checkpoint: VisionCheckpoint
    decoder: Decoder
    vision: Vision
    vision_precision: str
    limits: EngineLimits
    plan: EnginePlan


def specify(checkpoint_dir: Path, options: BuildOptions, memory_bytes: int) -> EngineSpec:
    """Reads the checkpoint and chooses targets. Raises `UserError` for what cannot be built.

    `memory_bytes` is that of the machine: `auto` takes the torch vision executor where the
    float32 graph would exceed half of it.
    """
    manifest.read_manifest(checkpoint_dir, "checkpoint")
    config = CheckpointConfig.read(checkpoint_dir / "config.json")
    vision_checkpoint = VisionCheckpoint.read(checkpoint_dir / "vision")
    vision = options.vision
    if vision == "auto":
        graph_bytes = vision_weight_bytes(vision_checkpoint.vision, "float32")
        wants_torch = options.vision_precision not in (None, *ONNX_PRECISIONS)
        fits = graph_bytes <= memory_bytes / 2
        vision = "onnxruntime" if fits and not wants_torch else "torch"
        log.info("vision: %s (%s)", vision, _why(graph_bytes, memory_bytes, wants_torch))
    if options.decoder == "auto":
        log.info("decoder: torch (TensorRT-LLM engines are not built by this version)")
    precision = options.vision_precision
    if vision == "onnxruntime" and precision not in (None, *ONNX_PRECISIONS):
        raise UserError(
            f"--vision_precision {precision} is not for --vision onnxruntime, expected "
            f"{' or '.join(ONNX_PRECISIONS)}; use --vision torch"
        )
    if precision == "FP8" and not vision_checkpoint.has_scales:
        raise UserError(
            f"{vision_checkpoint.directory} has no {SCALES}, which --vision_precision FP8 needs; "
            "convert with --quant_algo FP8"
        )
    precision = precision or ("float32" if vision == "onnxruntime" else vision_checkpoint.dtype)
    limits = derive_limits(
        config.decoder,
        vision_checkpoint.tiling,
        vision_checkpoint.vision.tokens_per_tile,
        max_batch_size=options.max_batch_size,
        max_num_images=options.max_num_images,
        max_input_len=options.max_input_len,
        max_seq_len=options.max_seq_len,
        max_num_tokens=options.max_num_tokens,
    )
    plan = plan_engine(config, vision_checkpoint.vision, precision, limits)
    return EngineSpec(
        checkpoint_dir, config, vision_checkpoint, "torch", vision, precision, limits, plan
    )


def _why(graph_bytes: int, memory_bytes: int, wants_torch: bool) -> str:
    if wants_torch:
        return "the precision asked for needs it"
    comparison = "at most" if graph_bytes <= memory_bytes / 2 else "more than"
    return (
        f"its float32 graph of {graph_bytes / 1e9:.1f} GB is {comparison} half of "
        f"{memory_bytes / 1e9:.1f} GB memory"
    )


def build_engine(
    spec: EngineSpec, engine_dir: Path, options: BuildOptions, *, overwrite: bool = False
) -> None:
    """Writes vision, decoder, tokenizer and manifest; `engine_dir` appears whole or not at all."""
    with staged_directory(engine_dir, "--engine_dir", overwrite=overwrite) as staging:
        _build_vision(spec, staging / "vision")
        _build_decoder(spec, staging / "llm")
        shutil.copytree(spec.checkpoint_dir / "tokenizer", staging / "tokenizer")
        manifest.write_manifest(
            staging,
            "engine",
            arguments=asdict(options),
            limits=spec.limits.to_json(),
            source=_provenance(spec),
        )


def is_up_to_date(spec: EngineSpec, engine_dir: Path, options: BuildOptions) -> bool:
    """Whether `build_engine` would only repeat what `engine_dir` already holds."""
    return manifest.is_current(
        engine_dir, "engine", arguments=asdict(options), source=_provenance(spec)
    )


def _provenance(spec: EngineSpec) -> dict[str, object]:
    """What the engine was made from, and what `auto` chose on this machine."""
    checkpoint = manifest.read_manifest(spec.checkpoint_dir, "checkpoint")
    return {
        "checkpoint_digest": checkpoint.digest,
        "checkpoint_versions": checkpoint.versions,
        "decoder": spec.decoder,
        "vision": spec.vision,
    }


def _build_vision(spec: EngineSpec, directory: Path) -> None:
    directory.mkdir()
    source = spec.vision_checkpoint
    if spec.vision == "onnxruntime":
        export_vision(source, spec.vision_precision, directory)
    else:
        for name in (WEIGHTS, SCALES):
            if (source.directory / name).is_file():
                link_or_copy(source.directory / name, directory / name)
    write_json_atomically(
        directory / "config.json",
        {
            "executor": spec.vision,
            "precision": spec.vision_precision,
            "dtype": source.dtype,
            "vision": asdict(source.vision),
            "tiling": asdict(source.tiling),
        },
    )


def _build_decoder(spec: EngineSpec, directory: Path) -> None:
    """The torch target runs exactly the checkpoint's tensors; layouts are made at load."""
    directory.mkdir()
    weights = spec.checkpoint_dir / "rank0.safetensors"
    open_checked(weights, decoder_tensors(spec.config))
    link_or_copy(weights, directory / "rank0.safetensors")
    # The three keys of an engine's config.json in TensorRT-LLM.
    write_json_atomically(
        directory / "config.json",
        {
            "version": __version__,
            "pretrained_config": spec.config.to_json(),
            "build_config": {"target": spec.decoder, **spec.limits.to_json()},
        },
    )
