"""<answers>.run.json: what made a file of answers, so that a rerun does not mix two engines' and
the report can say what it reports on and find the images again."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from evaluation.datasets.records import RecordError, field, string_list
from evaluation.sample import Location, SampleId
from nvlm.errors import UserError
from nvlm.json_files import read_json_object, write_json_beside
from runtime.engine_dir import EngineDir
from runtime.types import GenerationRequest

FORMAT_VERSION = 1
_MAY_BE_NONE = (str, NoneType)
_TYPES: dict[str, dict[str, type | tuple[type, ...]]] = {
    "": {
        "format_version": int,
        "task": str,
        "settings": dict,
        "data": dict,
        "partition_id": int,
        "num_partitions": int,
        "num_samples": int,
        "image_bytes": dict,
        "num_samples_per_partition": int,
        "num_records": int,
        "num_bad_records": int,
        "num_missing_parts": int,
    },
    "settings": {
        "engine": str,
        "quant_algo": _MAY_BE_NONE,
        "kv_cache_quant_algo": _MAY_BE_NONE,
        "dtype": str,
        "decoder": str,
        "vision": str,
        "image_size": int,
        "max_num_tiles": int,
        "system": str,
        "prompt_format": str,
        "max_new_tokens": int,
        "stop": list,
        "sampling": dict,
    },
    "data": {
        "input_image_path": str,
        "gt_path": list,
        "split": _MAY_BE_NONE,
        "num_frames": int,
    },
}
_NOT_IN_OLDER_ONES = {
    "image_bytes": {},
    **dict.fromkeys(
        ("num_samples_per_partition", "num_records", "num_bad_records", "num_missing_parts"), 0
    ),
}
_ENGINE = ("engine", "quant_algo", "kv_cache_quant_algo", "dtype", "decoder", "vision")
"""The settings that are the engine's own: what a comparison of engines is about."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """`settings` decide the answers; `data` says where engine and data set lay; `num_samples` is
    the size of this partition; `image_bytes` of each sample's images, by the id as text;
    `num_samples_per_partition` 0: the `num_records` of the data set are shared out evenly;
    `num_bad_records` of this partition were no samples, and the copy of the data set lacks
    `num_missing_parts` whose records nobody can count."""

    task: str
    settings: dict[str, Any]
    data: dict[str, Any]
    partition_id: int
    num_partitions: int
    num_samples: int
    image_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    num_samples_per_partition: int = 0
    num_records: int = 0
    num_bad_records: int = 0
    num_missing_parts: int = 0
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Raises `UserError` for what this version did not write as it is."""
        values = {**_NOT_IN_OLDER_ONES, **read_json_object(path)}
        try:
            _check(values)
            return cls(**values)
        except (RecordError, TypeError) as error:
            raise UserError(
                f"{path} is no record of a run by this version: it {error}; use another "
                "--output_path, or delete it to score the answers without it"
            ) from None

    def write(self, path: Path) -> None:
        write_json_beside(path, asdict(self), "--output_path")

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

    def differs_in_image(self, earlier: RunRecord, sample_id: SampleId) -> bool:
        """Whether a sample's images have another size; not where one of the two is not known."""
        sizes = {record.image_bytes.get(str(sample_id)) for record in (self, earlier)}
        return len(sizes - {None}) > 1

    def asked_otherwise(self, other: RunRecord) -> list[str]:
        """What parts the two beside the engine, each with both values."""
        ours, theirs = (
            {**record.decisive, "split": record.data["split"]} for record in (self, other)
        )
        return [
            f"{name} {ours[name]!r} against {theirs.get(name)!r}"
            for name in ours
            if name not in _ENGINE and ours[name] != theirs.get(name)
        ]

    def require_same(self, earlier: RunRecord, path: Path) -> None:
        """Refuses to go on with answers of another engine, to other questions or with other
        settings. The number of samples may grow: a record of the data set was mended."""
        for name, value in self.decisive.items():
            if earlier.decisive.get(name) != value:
                raise UserError(
                    f"{path} says its answers were made with {name} {earlier._told(name)} and "
                    f"this run has {self._told(name)}; choose another --output_path"
                )

    def _told(self, name: str) -> str:
        """A decisive value; an engine by its folder and the beginning of its digest, since a
        folder may hold another engine by now."""
        value = self.decisive.get(name)
        if name != "engine":
            return repr(value)
        return f"{self.data.get('engine_dir', 'of an unknown folder')} ({str(value)[:8]})"

    def require_same_shares(self, other: RunRecord, path: Path) -> None:
        """Refuses answers beside those of other shares: some samples would be in none. A single
        share may grow, when the data set is completed."""
        names = ["num_partitions", "num_samples_per_partition"]
        if self.num_partitions > 1 and self.num_records and other.num_records:
            names.append("num_records")
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise UserError(
                    f"{path} says its answers were made with {name} {theirs} and this run has "
                    f"{ours}, which shares the records out otherwise; choose another --output_path"
                )


def _check(values: dict[str, Any]) -> None:
    """Raises `RecordError` where a field is missing, of another type or impossible."""
    if (version := field(values, "format_version", int)) != FORMAT_VERSION:
        raise RecordError(f"has format_version {version}, expected {FORMAT_VERSION}")
    for section, types in _TYPES.items():
        for key, expected in types.items():
            field(values[section] if section else values, key, expected)
    string_list(values["data"], "gt_path")
    for sample_id in values["image_bytes"]:
        field(values["image_bytes"], sample_id, int)
    if not 0 <= values["partition_id"] < values["num_partitions"] or values["num_samples"] < 0:
        raise RecordError(
            f"is of partition {values['partition_id']} of {values['num_partitions']} with "
            f"{values['num_samples']} samples"
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
