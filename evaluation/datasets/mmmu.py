"""MMMU (MMMU/MMMU): a folder of parquet files for each of 30 subjects.

As the reference does with prompt style single_image: the first picture alone, before the question,
and every `<image k>` taken out of the text.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from evaluation.datasets.literal_list import literal_list
from evaluation.datasets.parquet import ParquetFile, missing_files, parquet_files
from evaluation.datasets.prompts import mmmu_multiple_choice, options_by_letter, short_answer
from evaluation.datasets.records import Record, RecordError, collect, field
from evaluation.datasets.sample import DataSet, Location, Sample
from evaluation.scoring.mmmu import SUBJECTS, subject_of
from nvlm.program.errors import UserError, shown

DEFAULT_SPLIT = "validation"
_IMAGE_MARK = re.compile(r"<image [0-7]>")


def read_mmmu(location: Location) -> DataSet:
    records, incomplete = _records(location)
    return collect(records, _sample, incomplete)


def read_mmmu_answers(location: Location) -> dict[str, Record]:
    """id -> question_type and ground_truth, as in the MMMU repository's answer_dict_val.json."""
    answers = {}
    for _, record in _records(location)[0]:
        with contextlib.suppress(RecordError):  # an answer without a truth is named by its id
            answers[field(record, "id", str)] = {
                "question_type": field(record, "question_type", str),
                "ground_truth": _ground_truth(record),
            }
    return answers


def _records(location: Location) -> tuple[list[tuple[str, Record]], list[str]]:
    """The records, and what of the 30 subjects is missing."""
    split = location.split or DEFAULT_SPLIT
    records, incomplete = [], []
    for subject in SUBJECTS:
        paths = parquet_files(location.image_dir / subject, split)
        if not paths:
            incomplete.append(
                f"{location.image_dir} is missing {subject}/{split}-*.parquet, one of "
                f"{len(SUBJECTS)} subjects; download it"
            )
        incomplete += missing_files(paths)
        for path in paths:
            records += ParquetFile(path, re.compile(r"image_\d"), "MMMU").records()
    if not records:
        raise UserError(
            f"--input_image_path {location.image_dir} has no <subject>/{split}-*.parquet; give a "
            "copy of the data set MMMU/MMMU"
        )
    return records, incomplete


def _sample(_: int, record: Record) -> Sample:
    question_type = field(record, "question_type", str)
    question = field(record, "question", str).strip()
    sample_id = field(record, "id", str)
    fields: dict[str, Any] = {
        "question_type": question_type,
        "field": subject_of(sample_id).lower().replace("_", " "),
        "subfield": field(record, "subfield", str),
    }
    if question_type == "multiple-choice":
        letters = options_by_letter(_literal_list(record, "options"))
        if not letters:
            raise RecordError("has no options")
        question = mmmu_multiple_choice(question, list(letters.values()))
        fields |= {"index2ans": letters, "all_choices": list(letters)}
    else:
        question = short_answer(question)
    picture = field(record, "image_1", object)
    return Sample(sample_id, (picture, "\n" + _IMAGE_MARK.sub("", question)), fields)


def _ground_truth(record: Record) -> str | list[str]:
    """Open questions may have several answers, written as a Python list."""
    answer: str = field(record, "answer", str)
    if record["question_type"] != "multiple-choice" and answer.startswith("["):
        return _literal_list(record, "answer")
    return answer


def _literal_list(record: Record, key: str) -> list[str]:
    text = field(record, key, str)
    values = literal_list(text)
    if values is None:
        raise RecordError(f"has {key} {shown(text)}, expected a list")
    return values
