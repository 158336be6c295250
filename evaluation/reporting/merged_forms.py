"""The forms in which the reference's evaluators keep a task's answers, and servers take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from evaluation.datasets.sample import SampleId
from evaluation.scoring import mmmu
from evaluation.scoring.captions import comparable_caption
from evaluation.scoring.score import Line

MergedForm = Callable[[dict[SampleId, Line]], Any]


def whole_lines(lines: dict[SampleId, Line]) -> list[Line]:
    return list(lines.values())


def with_question_id(lines: dict[SampleId, Line]) -> list[Line]:
    return [{**line, "question_id": i} for i, line in lines.items()]


def answers_alone(lines: dict[SampleId, Line]) -> list[Line]:
    return [
        {"question_id": i, "answer": line["answer"], "gt_answer": line["gt_answer"]}
        for i, line in lines.items()
    ]


def captions(lines: dict[SampleId, Line]) -> list[Line]:
    return [
        {"image_id": i, "caption": comparable_caption(line["caption"])} for i, line in lines.items()
    ]


def submitted(id_name: str) -> MergedForm:
    """A list for EvalAI or the Robust Reading Competition, which differ in the id's name."""

    def form(lines: dict[SampleId, Line]) -> list[Line]:
        return [{id_name: i, "answer": line["answer"]} for i, line in lines.items()]

    return form


def responses(lines: dict[SampleId, Line]) -> dict[str, str]:
    """MathVista's form: results/leaderboad_submission_template, "response_only"."""
    return {str(i): line["answer"] for i, line in lines.items()}


def letters(lines: dict[SampleId, Line]) -> dict[str, str]:
    """MMMU's form, which its server takes too."""
    return {str(i): mmmu.parsed_prediction(line) for i, line in lines.items()}
