"""Whether an answer line has what its scorer reads: the lines may come from other programs."""

from __future__ import annotations

from typing import Any

from evaluation.datasets.records import RecordError, field, string_list
from evaluation.datasets.sample import SampleId
from evaluation.scoring.ocrbench import TYPES
from evaluation.tasks import Task
from nvlm.program.errors import shown

_QUESTION_TYPES = ("multi_choice", "free_form")


def scorable_id(task: Task, line: Any) -> SampleId:
    """The line's id. Raises `RecordError` for a line that cannot be scored. A single `gt_answer`
    becomes a list."""
    sample_id = task.form.id(line)
    if task.name == "VideoMME":
        field(line, "duration_category", (str, int))
        field(line["questions"][0], "answer", str)
    elif task.name == "captioning":
        if "ground_truth" in line:  # else --gt_path has it
            string_list(line, "ground_truth")
    elif task.name == "MMMU":
        if field(line, "question_type", str) == "multiple-choice":
            _check_choices(line)
    else:
        _check_truth(task, line)
    return sample_id


def _check_truth(task: Task, line: Any) -> None:
    if isinstance(field(line, "gt_answer", (str, list)), str):
        line["gt_answer"] = [line["gt_answer"]]
    truths = string_list(line, "gt_answer")
    if not truths or (len(truths) > 1 and task.has_one_truth):
        raise RecordError(f"has {len(truths)} answers in gt_answer, expected one")
    if task.name == "OCRBench":
        field(line, "dataset_name", str)
        _check_one_of(line, "data_type", TYPES)
    if task.name == "MathVista":
        _check_one_of(line, "question_type", _QUESTION_TYPES)
        if line["question_type"] == "multi_choice":
            _check_choices(line)


def _check_choices(line: Any) -> None:
    letters = string_list(line, "all_choices")
    options = field(line, "index2ans", dict)
    if not letters or not all(letter in options for letter in letters):
        raise RecordError("has no option in index2ans for a letter of all_choices")
    for letter in options:
        field(options, letter, str)


def _check_one_of(line: Any, key: str, expected: tuple[str, ...]) -> None:
    if (value := field(line, key, str)) not in expected:
        raise RecordError(f"has {key} {shown(value)}, expected one of {', '.join(expected)}")
