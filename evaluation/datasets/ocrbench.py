"""OCRBench.json, the hub's parquet files or VLMEvalKit's TSV: a list of questions of ten types, the
id is the position."""

from __future__ import annotations

from evaluation.datasets.packed import Packing, packed_records
from evaluation.datasets.question_answering import find_image
from evaluation.datasets.records import (
    Record,
    RecordError,
    collect,
    field,
    json_list,
    string_list,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from evaluation.scoring.ocrbench import FORMULAS, FORMULAS_TYPE, TYPES
from nvlm.program.errors import shown

PACKING = Packing(
    "echo840/OCRBench",
    "image_path",
    {
        "answers": ("answers", "answer"),
        "type": ("question_type", "category"),
        "dataset_name": ("dataset",),
    },
)


def read_ocrbench(location: Location) -> DataSet:
    packed = packed_records(location, PACKING, "OCRBench")

    def read(position: int, record: Record) -> Sample:
        answers = field(record, "answers", (str, list))
        answers = [answers] if isinstance(answers, str) else string_list(record, "answers")
        if not (answers and all(answers)):  # nothing stands in every answer
            raise RecordError(f"has answers {shown(answers)}, expected one or more")
        if (data_type := field(record, "type", str)) not in TYPES:
            raise RecordError(f"has type {shown(data_type)}, expected one of {', '.join(TYPES)}")
        return Sample(
            position,
            (
                find_image(location.image_dir, record, "image_path"),
                "\n" + field(record, "question", str),
            ),
            {
                "gt_answer": answers,
                "dataset_name": _dataset_name(record, data_type),
                "data_type": data_type,
            },
        )

    if packed is not None:
        return collect(packed[0], read, packed[1])
    return collect([record for path in location.gt_paths for record in json_list(path)], read)


def _dataset_name(record: Record, data_type: str) -> str:
    """VLMEvalKit's file has the type alone, by which formulas are known."""
    if "dataset_name" not in record and "category" in record:
        return FORMULAS if data_type == FORMULAS_TYPE else data_type
    name: str = field(record, "dataset_name", str)
    return name
