"""MathVista (AI4Math/MathVista): parquet files, split testmini."""

from __future__ import annotations

import re

from evaluation.datasets.parquet import ParquetFile, missing_files, parquet_files
from evaluation.datasets.prompts import LETTERS, options_by_letter, with_options
from evaluation.datasets.records import Record, RecordError, collect, field, string_list
from evaluation.datasets.sample import DataSet, Location, Sample
from nvlm.program.errors import UserError, shown

DEFAULT_SPLIT = "testmini"


def read_mathvista(location: Location) -> DataSet:
    split = location.split or DEFAULT_SPLIT
    paths = parquet_files(location.image_dir, split)
    if not paths:
        raise UserError(
            f"--input_image_path {location.image_dir} has no {split}-*.parquet; give a copy of the "
            "data set AI4Math/MathVista"
        )
    files = [ParquetFile(path, re.compile("decoded_image"), "MathVista") for path in paths]
    records = [record for file in files for record in file.records()]
    return collect(records, _sample, missing_files(paths))


def _sample(_: int, record: Record) -> Sample:
    question_type = field(record, "question_type", str)
    answer: str = field(record, "answer", str)
    letters: dict[str, str] = {}
    if question_type == "multi_choice":
        choices = string_list(record, "choices")
        letters = options_by_letter(choices)
        question = with_options(field(record, "question", str), choices)
        if answer:  # the test split hides it
            if answer not in choices:
                raise RecordError(f"has answer {shown(answer)}, which is none of its choices")
            answer = LETTERS[choices.index(answer)]
    else:
        question = field(record, "query", str).replace("Hint: ", "")
    return Sample(
        field(record, "pid", str),
        (field(record, "decoded_image", object), "\n" + question),
        {
            "gt_answer": [answer],
            "question_type": question_type,
            "index2ans": letters,
            "all_choices": list(letters),
        },
    )
