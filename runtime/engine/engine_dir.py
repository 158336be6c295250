"""An engine directory, read and checked: what it holds and what it was built for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.kv_cache import EngineKVCache
from nvlm.formats.manifest import Manifest, read_manifest
from nvlm.formats.scale_dtype import SCALE_DTYPE, scale_dtype
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.config import TilingConfig, VisionConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.vision import VISION_FORMAT
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from nvlm.program.json_files import StrictReader, read_json_object


@dataclass(frozen=True, slots=True)
class EngineDir:
    """An engine directory's small files, read and checked."""

    directory: Path  # as the user gave it
    manifest: Manifest  # what made it
    limits: EngineLimits  # what requests may hold
    checkpoint_config: CheckpointConfig  # of the decoder, with the engine's own KV cache
    decoder_target: str  # torch or tensorrt_llm
    vision_checkpoint: VisionCheckpoint  # its `directory` holds what the vision executor loads
    vision_executor: str  # torch, onnxruntime, tensorrt or tensorrt_rtx
    vision_precision: str  # a type or FP8

    @property
    def vision_config(self) -> VisionConfig:
        return self.vision_checkpoint.config

    @property
    def tiling(self) -> TilingConfig:
        return self.vision_checkpoint.tiling

    @property
    def packages(self) -> dict[str, str]:
        """Versions of the packages, and the compute capability of the GPU, it was built with."""
        packages: dict[str, str] = self.manifest.source.get("packages", {})
        return packages

    def scale_dtype(self) -> str | None:
        """What the decoder's scales are numbers of, by the stored ones; None without any."""
        recorded = self.manifest.source.get(SCALE_DTYPE)
        return scale_dtype(self.directory / layout.LLM, self.checkpoint_config, recorded)

    @classmethod
    def read(cls, directory: Path) -> EngineDir:
        """Raises `UserError` for a directory that is missing, unfinished or damaged."""
        manifest = read_manifest(directory, "engine")
        target = manifest.source.get("decoder")
        llm_path = directory / layout.LLM / layout.decoder_config_file(str(target))
        llm = StrictReader(read_json_object(llm_path), llm_path)
        _require_built_limits(manifest, directory, llm.section("build_config").values)
        vision_path = directory / layout.VISION / layout.CONFIG
        vision = StrictReader(read_json_object(vision_path), vision_path)
        config = CheckpointConfig.from_json(llm.section("pretrained_config").values, llm_path)
        kv_cache = EngineKVCache.from_json(llm, config.decoder.num_hidden_layers)
        return cls(
            directory=directory,
            manifest=manifest,
            limits=_limits(manifest, directory),
            checkpoint_config=replace(config, kv_cache=kv_cache),
            decoder_target=llm.section("build_config").string("target"),
            vision_checkpoint=VisionCheckpoint.read(directory / layout.VISION),
            vision_executor=vision.string("executor"),
            vision_precision=vision.one_of("precision", (*TORCH_DTYPES, VISION_FORMAT.name)),
        )


def _require_built_limits(manifest: Manifest, directory: Path, built: dict[str, Any]) -> None:
    try:
        StrictReader(manifest.limits, directory / layout.MANIFEST, "limits.").refuse_unlike(
            {name: value for name, value in built.items() if name != "target"}
        )
    except UserError as error:
        raise UserError(
            f"{error}, which it was built for; other limits are build_engine.py's to make"
        ) from None


def _limits(manifest: Manifest, directory: Path) -> EngineLimits:
    try:
        return EngineLimits(**manifest.limits)
    except TypeError as error:
        raise UserError(
            f"{directory} was built by another version ({error}); build it again with "
            f"build_engine.py --engine_dir {directory} --overwrite"
        ) from None
