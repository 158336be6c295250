"""OCRBench.json: a list of questions of ten types, the id is the position."""

from __future__ import annotations

from evaluation.datasets.records import (
    Record,
    RecordError,
    collect,
    field,
    json_list,
    named_file,
    string_list,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from evaluation.scoring.ocrbench import TYPES


def read_ocrbench(location: Location) -> DataSet:
    def read(position: int, record: Record) -> Sample:
        answers = field(record, "answers", (str, list))
        answers = [answers] if isinstance(answers, str) else string_list(record, "answers")
        if not (answers and all(answers)):  # nothing stands in every answer
            raise RecordError(f"has answers {answers!r}, expected one or more")
        if (data_type := field(record, "type", str)) not in TYPES:
            raise RecordError(f"has type {data_type!r}, expected one of {', '.join(TYPES)}")
        return Sample(
            position,
            (
                named_file(location.image_dir, record, "image_path"),
                "\n" + field(record, "question", str),
            ),
            {
                "gt_answer": answers,
                "dataset_name": field(record, "dataset_name", str),
                "data_type": data_type,
            },
        )

    return collect([record for path in location.gt_paths for record in json_list(path)], read)
