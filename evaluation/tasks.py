"""The tasks: how each is read, what its answer lines look like, how it is scored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from evaluation.datasets.captioning import read_captions
from evaluation.datasets.mathvista import DEFAULT_SPLIT as MATHVISTA_SPLIT
from evaluation.datasets.mathvista import read_mathvista
from evaluation.datasets.mmmu import DEFAULT_SPLIT as MMMU_SPLIT
from evaluation.datasets.mmmu import read_mmmu
from evaluation.datasets.multiple_choice import read_ai2d, read_realworld_qa
from evaluation.datasets.ocrbench import read_ocrbench
from evaluation.datasets.question_answering import (
    CHART_QA,
    INFO_VQA,
    SP_DOC_VQA,
    TEXT_VQA,
    read_questions,
    read_vqa_v2,
)
from evaluation.datasets.video_mme import read_video_mme
from evaluation.merged_forms import (
    MergedForm,
    answers_alone,
    captions,
    letters,
    whole_lines,
    with_question_id,
)
from evaluation.sample import DataSet, Location, Sample, SampleId
from evaluation.scoring.captions import score_captions
from evaluation.scoring.mathvista import score_mathvista
from evaluation.scoring.mmmu import score_mmmu
from evaluation.scoring.ocrbench import score_ocrbench
from evaluation.scoring.score import Line, Scorer
from evaluation.scoring.short_answers import (
    anls,
    anls_official,
    exact_match,
    exact_match_official,
    relaxed_accuracy,
    relaxed_accuracy_official,
    score_by,
    vqa_accuracy,
    vqa_accuracy_official,
)
from evaluation.scoring.video_mme import score_video_mme
from nvlm.errors import UserError

DEFAULT_MAX_NEW_TOKENS = 128
"""Megatron-LM's default. Its script for NVLM-D says 16, which cuts OCRBench's formulas short."""


@dataclass(frozen=True, slots=True)
class Task:
    """`name` is Megatron-LM's spelling; `answer_fields` of a line hold the answer. Parquet data
    sets bring their own ground truth, and have a `default_split`. `max_num_tiles`: None for the
    engine's own number. `submission_id`: what the server calls the id beside "answer" (EvalAI;
    Robust Reading Competition). `scored_with_gt_path`: the lines lack the truth, or may, or the
    server wants questions that were not asked."""

    name: str
    read: Callable[[Location], DataSet]
    score: Scorer
    answer_fields: tuple[str, ...] = ("answer",)
    gt_file: Literal["needed", "possible", "none"] = "needed"
    max_num_tiles: int | None = None
    unit: str = "%"
    default_split: str | None = None
    merged_form: MergedForm = whole_lines
    submission_id: str | None = None
    has_one_truth: bool = False
    scored_with_gt_path: bool = False


TASKS = {
    task.name: task
    for task in (
        Task(
            "captioning",
            read_captions,
            score_captions,
            ("caption",),
            unit="CIDEr",
            merged_form=captions,
            scored_with_gt_path=True,
        ),
        Task(
            "TextVQA",
            partial(read_questions, keys=TEXT_VQA),
            score_by(vqa_accuracy, leaving_one_person_out=vqa_accuracy_official),
            merged_form=answers_alone,
            submission_id="question_id",
        ),
        Task(
            "VQAv2",
            read_vqa_v2,
            score_by(vqa_accuracy, leaving_one_person_out=vqa_accuracy_official),
            merged_form=with_question_id,
            submission_id="question_id",
            scored_with_gt_path=True,
        ),
        Task(
            "ChartQA",
            partial(read_questions, keys=CHART_QA),
            score_by(relaxed_accuracy, by_the_rules_of_ChartQA=relaxed_accuracy_official),
            merged_form=with_question_id,
            has_one_truth=True,
        ),
        Task(
            "SPDocVQA",
            partial(read_questions, keys=SP_DOC_VQA),
            score_by(anls, as_it_is_written=anls_official),
            merged_form=answers_alone,
            submission_id="questionId",
        ),
        Task(
            "InfoVQA",
            partial(read_questions, keys=INFO_VQA),
            score_by(anls, as_it_is_written=anls_official),
            merged_form=answers_alone,
            submission_id="questionId",
        ),
        Task(
            "MMMU",
            read_mmmu,
            score_mmmu,
            ("text", "prediction"),
            gt_file="none",
            default_split=MMMU_SPLIT,
            merged_form=letters,
            scored_with_gt_path=True,
        ),
        Task(
            "MathVista",
            read_mathvista,
            score_mathvista,
            gt_file="none",
            default_split=MATHVISTA_SPLIT,
            has_one_truth=True,
        ),
        Task("OCRBench", read_ocrbench, score_ocrbench, unit="points"),
        Task(
            "AI2D",
            read_ai2d,
            score_by(exact_match, as_it_is_written=exact_match_official),
            merged_form=answers_alone,
            has_one_truth=True,
        ),
        Task(
            "RealworldQA",
            read_realworld_qa,
            score_by(exact_match, as_it_is_written=exact_match_official),
            gt_file="possible",
            merged_form=with_question_id,
            has_one_truth=True,
        ),
        Task("VideoMME", read_video_mme, score_video_mme, max_num_tiles=1),
    )
}

_USERS_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)
_ALIASES = {"docvqa": "SPDocVQA", "infographicvqa": "InfoVQA"}


def find_task(name: str) -> Task:
    """By name, in upper or lower case."""
    lowered = name.lower().replace("-", "").replace("_", "")
    by_lower_case = {task.lower(): task for task in TASKS}
    found = by_lower_case.get(lowered) or _ALIASES.get(lowered)
    if found is None:
        raise UserError(f"--task {name} is unknown, expected one of {', '.join(TASKS)}")
    return TASKS[found]


def answer_line(task: Task, sample: Sample, prompt: str, text: str) -> Line:
    """What Megatron-LM's run_text_generation.py writes for an answer.

    As its branch NVLM-1.0, an answer is its first line that is not empty.
    """
    answer = text.strip().split("\n")[0]
    if task.name == "VideoMME":
        (question,) = sample.fields["questions"]
        return {**sample.fields, "questions": [{**question, "response": answer}]}
    named = dict.fromkeys(task.answer_fields, answer)
    return {"sample_id": sample.id, "prompt": prompt, **named, **sample.fields}


def question_of(task: Task, line: Line) -> str:
    """What was asked, without the template around it and the marks of images."""
    if task.name == "VideoMME":
        (question,) = line["questions"]
        return str(question.get("question", ""))
    prompt = str(line.get("prompt", ""))
    turn = _USERS_TURN.search(prompt)
    return (turn[1] if turn else prompt).replace("<Image><image></Image>", "").strip()


def question_digest(task: Task, line: Line) -> bytes:
    """Of all that a line says beside the answer."""
    asked: Line
    if task.name == "VideoMME":
        (question,) = line["questions"]
        asked = {**line, "questions": {k: v for k, v in question.items() if k != "response"}}
    else:
        asked = {key: value for key, value in line.items() if key not in task.answer_fields}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()


def line_id(task: Task, line: Any) -> SampleId:
    """Raises LookupError or TypeError for a line that is not one of this task's."""
    sample_id: SampleId
    if task.name == "VideoMME":
        (question,) = line["questions"]
        sample_id, _ = question["question_id"], question["response"]
    else:
        sample_id, _ = line["sample_id"], [line[name] for name in task.answer_fields]
    return sample_id
