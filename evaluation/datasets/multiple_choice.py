"""AI2D and RealworldQA."""

from __future__ import annotations

import os
from pathlib import Path

from evaluation.datasets.packed import TSV, Packing, packed_records
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
from nvlm.program.errors import shown

_OPTIONS = ("A", "B", "C", "D", "E", "F")
AI2D = Packing("lmms-lab/ai2d", "image", {"question_id": ("index",)}, numbers=("question_id",))
REALWORLD_QA = Packing(
    "xai-org/RealworldQA", "image", {"question_id": ("index",)}, numbers=("question_id",)
)


def read_ai2d(location: Location) -> DataSet:
    """JSONL of image, question_id, question (with its options) and answer (a letter); or packed,
    with the options apart."""
    if (packed := packed_records(location, AI2D, "AI2D")) is not None:
        return collect(packed[0], _multiple_choice, packed[1])

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


def _multiple_choice(position: int, record: Record) -> Sample:
    """A packed row: the hub's has `options` and the index of the answer, VLMEvalKit's a column a
    letter and the letter of the answer. Rows without an id are numbered."""
    truth = answer(record, "answer").strip()
    options = _options(record)
    if options and truth.isdecimal():
        if int(truth) >= len(options):
            raise RecordError(f"has answer {shown(truth)} and {len(options)} options")
        truth = LETTERS[int(truth)]
    question: str = field(record, "question", str)
    asked = with_options(question, options) if options else short_answer(question)
    content = (field(record, "image", object), "\n" + asked)
    return Sample(record.get("question_id", position), content, {"gt_answer": [truth]})


def _options(record: Record) -> list[str]:
    if "options" in record:
        return string_list(record, "options")
    return [record[letter] for letter in _OPTIONS if letter in record]


def read_realworld_qa(location: Location) -> DataSet:
    """xAI's list of records (JSON or JSONL), Megatron-LM's conversion of it, which has the options
    apart, VLMEvalKit's TSV, or the parquet files of xai-org/RealworldQA."""
    packed = packed_records(location, REALWORLD_QA, "RealworldQA")
    if packed is not None and location.gt_paths and location.gt_paths[0].suffix.lower() == TSV:
        return collect(packed[0], _multiple_choice, packed[1])
    if packed is not None:
        return collect(packed[0], _realworld_row, packed[1])

    def read(_: int, record: Record) -> Sample:
        """The id is the number in the image's name (0.webp)."""
        image = named_file(location.image_dir, record, "image")
        if not image.stem.isdecimal():
            name = record["image"]
            raise RecordError(f"has image {shown(name)}, expected a number and an extension")
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
    """Recognises a file of JSON lines by its first character."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            is_lines = file.read(4096).lstrip().startswith("{")
    except OSError:
        is_lines = False  # the reader reports it
    return json_lines(path) if is_lines else json_list(path)


def _realworld_row(position: int, record: Record) -> Sample:
    """The hub's rows have no ids: they are numbered."""
    question, truth = _realworld_question(record)
    picture = field(record, "image", object)
    return Sample(position, (picture, "\n" + question), {"gt_answer": [truth]})
