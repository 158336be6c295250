"""<answers>.run.json: what made a file of answers, so that a rerun does not mix two engines' and
the report can say what it reports on and find the images again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.sample import Location
from nvlm.errors import UserError
from nvlm.json_files import read_json_object, write_json_atomically
from runtime.engine_dir import EngineDir
from runtime.types import GenerationRequest

FORMAT_VERSION = 1
_ENGINE = ("engine", "quant_algo", "kv_cache_quant_algo", "dtype", "decoder", "vision")
"""The settings that are the engine's own: what a comparison of engines is about."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """`settings` decide the answers; `data` says where engine and data set lay; `num_samples` is
    the size of this partition."""

    task: str
    settings: dict[str, Any]
    data: dict[str, Any]
    partition_id: int
    num_partitions: int
    num_samples: int
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        values = read_json_object(path)
        try:
            record = cls(**values)
            if record.format_version != FORMAT_VERSION:
                raise TypeError(f"format_version {record.format_version!r} for {FORMAT_VERSION}")
        except TypeError as error:
            raise UserError(
                f"{path} was not written by this version ({error}); use another --output_path"
            ) from None
        return record

    def write(self, path: Path) -> None:
        try:
            write_json_atomically(path, asdict(self))
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; choose another --output_path"
            ) from None

    @property
    def location(self) -> Location:
        return Location(
            Path(self.data["input_image_path"]),
            tuple(map(Path, self.data["gt_path"])),
            self.data["split"],
            self.data["num_frames"],
        )

    @property
    def decisive(self) -> dict[str, Any]:
        """What answers in one file, or in one score, have in common. Of the questions only the
        files' names: the data set may move."""
        names = [Path(path).name for path in self.data["gt_path"]]
        return {**self.settings, "gt_path": names, "num_frames": self.data["num_frames"]}

    def asked_otherwise(self, other: RunRecord) -> list[str]:
        """What parts the two beside the engine, each with both values."""
        ours, theirs = self.decisive, other.decisive
        return [
            f"{name} {ours[name]!r} against {theirs.get(name)!r}"
            for name in ours
            if name not in _ENGINE and ours[name] != theirs.get(name)
        ]

    def require_same(self, earlier: RunRecord, path: Path) -> None:
        """Refuses to go on with answers of another engine, to other questions or with other
        settings. The number of samples may grow: a record of the data set was mended."""
        for name, value in self.decisive.items():
            found = earlier.decisive.get(name)
            if found != value:
                raise UserError(
                    f"{path} says its answers were made with {name} {found!r} and this run has "
                    f"{value!r}; choose another --output_path"
                )


def settings_of(
    engine: EngineDir, request: GenerationRequest, max_num_tiles: int | None
) -> dict[str, Any]:
    """What decides the answers, and what the report shows."""
    config = engine.checkpoint_config
    return {
        "engine": engine.manifest.digest,
        "quant_algo": config.quant_algo,
        "kv_cache_quant_algo": config.kv_cache_quant_algo,
        "dtype": config.dtype,
        "decoder": engine.decoder_target,
        "vision": f"{engine.vision_executor} {engine.vision_precision}",
        "image_size": engine.vision.tiling.image_size,
        "max_num_tiles": max_num_tiles or engine.vision.tiling.max_num_tiles,
        "system": request.system,
        "prompt_format": request.prompt_format,
        "max_new_tokens": request.max_new_tokens,
        "stop": list(request.stop),
        "sampling": asdict(request.sampling),
    }
