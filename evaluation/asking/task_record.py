"""What a benchmark adds to the record of a run: its data set, its share and its images.

The report says by it what it reports on, and finds the images again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from evaluation.datasets.sample import Location, SampleId
from nvlm.model.number_formats import UNQUANTIZED
from nvlm.program.errors import UserError, shown
from runtime.answers.run_record import (
    EngineId,
    RecordForm,
    RunRecord,
    Types,
    differences,
    require_same,
    settings_of,
)
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest

_FLAG = "--output_path"
_MAY_BE_NONE = (str, NoneType)
_ENGINE_SETTINGS: Types = {
    "quant_algo": _MAY_BE_NONE,
    "kv_cache_quant_algo": _MAY_BE_NONE,
    "dtype": str,
    "decoder": str,
    "vision": str,
}
"""The settings that are the engine's own: what a comparison of engines is about."""

_TYPES: Types = {
    "settings": {
        **_ENGINE_SETTINGS,
        "image_size": int,
        "max_num_tiles": int,
        "system": str,
        "prompt_format": str,
        "max_new_tokens": int,
        "stop": list,
    },
    "task": {
        "task": str,
        "data": {
            "input_image_path": str,
            "gt_path": list,
            "split": _MAY_BE_NONE,
            "num_frames": int,
        },
        "partition_id": int,
        "num_partitions": int,
        "num_samples": int,
        "image_bytes": dict,
        "num_samples_per_partition": int,
        "num_records": int,
        "num_bad_records": int,
        "num_missing_parts": int,
        "checkpoint": str,
        "date": str,
    },
}
_OPTIONAL = frozenset(
    {
        "stop",
        "image_bytes",
        "num_samples_per_partition",
        "num_records",
        "num_bad_records",
        "num_missing_parts",
        "checkpoint",
        "date",
    }
)
"""A setting that may be neutral, and what the first records did not have."""


def _fault(values: dict[str, Any]) -> str | None:
    """What is impossible in a record whose fields have the right types."""
    task = values["task"]
    gt_path, image_bytes = task["data"]["gt_path"], task.get("image_bytes", {})
    if not all(isinstance(path, str) for path in gt_path):
        return f"has gt_path {shown(gt_path)}, expected a list of strings"
    for sample_id, num_bytes in image_bytes.items():
        if not isinstance(num_bytes, int) or isinstance(num_bytes, bool):
            return f"has {sample_id} {shown(num_bytes)}, expected int"
    if not 0 <= task["partition_id"] < task["num_partitions"] or task["num_samples"] < 0:
        return (
            f"is of partition {task['partition_id']} of {task['num_partitions']} with "
            f"{task['num_samples']} samples"
        )
    return None


_FORM = RecordForm(
    f"use another {_FLAG}, or delete it to score the answers without it",
    _TYPES,
    _OPTIONAL,
    _fault,
)


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """What made the answers of one partition of a benchmark."""

    engine: EngineId  # that answered
    # Decide the answers: the engine's own settings and those of every request.
    settings: dict[str, Any]
    task: str  # name of the benchmark
    # Where the data set lay.
    data: dict[str, Any]
    partition_id: int  # from 0
    num_partitions: int  # of the whole data set
    # The size of this partition.
    num_samples: int
    # Bytes of each sample's images, by its id as text.
    image_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    # 0 where the `num_records` of the data set are shared out evenly.
    num_samples_per_partition: int = 0
    num_records: int = 0  # of the whole data set
    # Records of this partition that were no samples.
    num_bad_records: int = 0
    # Parts that are missing from this copy of the data set: nobody can count their records.
    num_missing_parts: int = 0
    # The digest of the checkpoint that the engine was built from.
    checkpoint: str = ""
    # Day of the last run that wrote into the file, as 2026-11-30.
    date: str = ""

    @classmethod
    def read(cls, path: Path) -> TaskRecord:
        """Reads the record of this version or an older one.

        Raises `UserError` for a file that is anything else.
        """
        run = RunRecord.read(path, _FORM)
        return cls(run.engine, run.settings, **run.task)

    def write(self, path: Path) -> None:
        section = asdict(self)
        del section["engine"], section["settings"]
        RunRecord(self.engine, self.settings, task=section).write(path, _FLAG)

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
        """What answers in one file, or in one score, have in common.

        It names the questions' files without their folder: the data set may move.
        """
        names = [Path(path).name for path in self.data["gt_path"]]
        run = RunRecord(self.engine, self.settings)
        return {**run.decisive, "gt_path": names, "num_frames": self.data["num_frames"]}

    def differs_in_image(self, earlier: TaskRecord, sample_id: SampleId) -> bool:
        """Whether a sample's images have another size; not where one of the two is not known."""
        sizes = {record.image_bytes.get(str(sample_id)) for record in (self, earlier)}
        return len(sizes - {None}) > 1

    def asked_otherwise(self, other: TaskRecord) -> list[str]:
        """What parts the two beside the engine, each with both values."""
        ours, theirs = (
            {**record.decisive, "split": record.data["split"]} for record in (self, other)
        )
        return [
            f"{name} {our} against {their}"
            for name, our, their in differences(ours, theirs)
            if name != "engine" and name not in _ENGINE_SETTINGS
        ]

    def require_same(self, earlier: TaskRecord, path: Path) -> None:
        """Refuses to resume answers of another engine, to other questions or with other settings.

        The number of samples may grow: a record of the data set was fixed.
        """
        require_same(earlier.decisive, self.decisive, path, _FLAG)

    def require_same_shares(self, other: TaskRecord, path: Path) -> None:
        """Refuses answers beside those of other shares: some samples would be in none.

        A single share may grow, when the data set is completed.
        """
        names = ["num_partitions", "num_samples_per_partition"]
        if self.num_partitions > 1 and self.num_records and other.num_records:
            names.append("num_records")
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise UserError(
                    f"{path} says its answers were made with {name} {theirs} and this run has "
                    f"{ours}, which shares the records out otherwise; choose another {_FLAG}"
                )


def task_settings(
    engine: EngineDir, request: GenerationRequest, max_num_tiles: int | None
) -> dict[str, Any]:
    """What decides the answers, and what the report shows."""
    config = engine.checkpoint_config
    is_in_dtype = config.kv_cache_format is UNQUANTIZED
    return {
        "quant_algo": config.quant_algo,
        "kv_cache_quant_algo": None if is_in_dtype else config.kv_cache_name,
        "dtype": config.dtype,
        "decoder": engine.decoder_target,
        "vision": f"{engine.vision_executor} {engine.vision_precision}",
        "image_size": engine.tiling.image_size,
        **settings_of(request),
        "max_num_tiles": max_num_tiles or engine.tiling.max_num_tiles,
    }
