"""AI2D (JSONL, the options in the question) and RealworldQA (JSON, options apart)."""

from __future__ import annotations

from pathlib import Path

from evaluation.datasets.records import (
    Record,
    RecordError,
    answer,
    collect,
    field,
    json_lines,
    json_list,
    string_list,
)
from evaluation.prompts import LETTERS, short_answer, with_options
from evaluation.sample import DataSet, Location, Sample


def read_ai2d(location: Location) -> DataSet:
    """Fields image, question_id, question, answer (a letter)."""

    def read(_: int, record: Record) -> Sample:
        name = field(record, "image", str)
        # NVLM-1.0 joins the whole name, main its last part.
        path = location.image_dir / name
        image = path if path.is_file() else location.image_dir / Path(name).name
        return Sample(
            field(record, "question_id", (int, str)),
            (image, "\n" + field(record, "question", str)),
            {"gt_answer": [answer(record, "answer")]},
        )

    return collect([record for path in location.gt_paths for record in json_lines(path)], read)


def read_realworld_qa(location: Location) -> DataSet:
    """The id is the number in the image's name (0.webp)."""

    def read(_: int, record: Record) -> Sample:
        name = field(record, "image", str)
        if not Path(name).stem.isdecimal():
            raise RecordError(f"has image {name!r}, expected a number and an extension")
        question = field(record, "question", str)
        if field(record, "question_type", str) == "multi-choice":
            choices = string_list(record, "choices")
            index = field(record, "correct_choice_index", int)
            if not 0 <= index < len(choices):
                raise RecordError(f"has correct_choice_index {index} and {len(choices)} choices")
            question, truth = with_options(question, choices), LETTERS[index]
        else:
            question, truth = short_answer(question), answer(record, "answer")
        return Sample(
            int(Path(name).stem),
            (location.image_dir / name, "\n" + question),
            {"gt_answer": [truth]},
        )

    return collect([record for path in location.gt_paths for record in json_list(path)], read)
