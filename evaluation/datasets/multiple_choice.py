"""AI2D and RealworldQA."""

from __future__ import annotations

import os
import re
from pathlib import Path

from evaluation.datasets.parquet import ParquetFile, missing_files, parquet_files
from evaluation.datasets.prompts import LETTERS, short_answer, with_options
from evaluation.datasets.records import (
    Record,
    RecordError,
    answer,
    collect,
    field,
    json_lines,
    json_list,
    named_file,
    string_list,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from nvlm.program.errors import UserError

_REALWORLD_QA_SPLIT = "test"


def read_ai2d(location: Location) -> DataSet:
    """JSONL of image, question_id, question (with its options) and answer (a letter)."""

    def read(_: int, record: Record) -> Sample:
        # NVLM-1.0 joins the whole name, main its last part.
        path = named_file(location.image_dir, record, "image")
        image = path if os.path.isfile(path) else location.image_dir / path.name
        return Sample(
            field(record, "question_id", (int, str)),
            (image, "\n" + field(record, "question", str)),
            {"gt_answer": [answer(record, "answer")]},
        )

    return collect([record for path in location.gt_paths for record in json_lines(path)], read)


def read_realworld_qa(location: Location) -> DataSet:
    """xAI's list of records (JSON or JSONL), Megatron-LM's conversion of it, which has the options
    apart, or without --gt_path the parquet files of xai-org/RealworldQA."""
    if not location.gt_paths:
        return _realworld_qa_parquet(location.image_dir)

    def read(_: int, record: Record) -> Sample:
        """The id is the number in the image's name (0.webp)."""
        image = named_file(location.image_dir, record, "image")
        if not image.stem.isdecimal():
            name = record["image"]
            raise RecordError(f"has image {name!r}, expected a number and an extension")
        question, truth = _realworld_question(record)
        return Sample(int(image.stem), (image, "\n" + question), {"gt_answer": [truth]})

    return collect([record for path in location.gt_paths for record in _list_or_lines(path)], read)


def _realworld_question(record: Record) -> tuple[str, str]:
    """Question and answer. As xAI published them, the question holds its options and says how to
    answer, and is asked as it is."""
    question: str = field(record, "question", str)
    if "question_type" not in record:
        return question, answer(record, "answer")
    if field(record, "question_type", str) != "multi-choice":
        return short_answer(question), answer(record, "answer")
    choices = string_list(record, "choices")
    index = field(record, "correct_choice_index", int)
    if not 0 <= index < len(choices):
        raise RecordError(f"has correct_choice_index {index} and {len(choices)} choices")
    return with_options(question, choices), LETTERS[index]


def _list_or_lines(path: Path) -> list[tuple[str, Record]]:
    """A file of JSON lines is told by its first character."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            is_lines = file.read(4096).lstrip().startswith("{")
    except OSError:
        is_lines = False  # told by the reader
    return json_lines(path) if is_lines else json_list(path)


def _realworld_qa_parquet(folder: Path) -> DataSet:
    """The rows have no ids: they are numbered."""
    paths = parquet_files(folder, _REALWORLD_QA_SPLIT)
    if not paths:
        raise UserError(
            f"--input_image_path {folder} has no {_REALWORLD_QA_SPLIT}-*.parquet; give a copy of "
            "the data set xai-org/RealworldQA, or xAI's images and its annotations as --gt_path"
        )

    def read(position: int, record: Record) -> Sample:
        question, truth = _realworld_question(record)
        picture = field(record, "image", object)
        return Sample(position, (picture, "\n" + question), {"gt_answer": [truth]})

    files = [ParquetFile(path, re.compile("image"), "RealworldQA") for path in paths]
    records = [record for file in files for record in file.records()]
    return collect(records, read, missing_files(paths))
