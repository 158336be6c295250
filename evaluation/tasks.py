"""The tasks: how each is read, what its answer lines look like, how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from evaluation.asking.answer_lines import ANSWER_LINE, LineForm, SampleLine, VideoLine
from evaluation.datasets.captioning import read_captions
from evaluation.datasets.custom import read_custom
from evaluation.datasets.mathvista import DEFAULT_SPLIT as MATHVISTA_SPLIT
from evaluation.datasets.mathvista import read_mathvista
from evaluation.datasets.mmmu import DEFAULT_SPLIT as MMMU_SPLIT
from evaluation.datasets.mmmu import read_mmmu
from evaluation.datasets.multiple_choice import (
    AI2D,
    REALWORLD_QA,
    read_ai2d,
    read_realworld_qa,
)
from evaluation.datasets.ocrbench import PACKING as OCR_BENCH
from evaluation.datasets.ocrbench import read_ocrbench
from evaluation.datasets.question_answering import (
    CHART_QA,
    INFO_VQA,
    SP_DOC_VQA,
    TEXT_VQA,
    VQA_V2,
    read_questions,
    read_vqa_v2,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from evaluation.datasets.video_mme import read_video_mme
from evaluation.reporting.merged_forms import (
    MergedForm,
    answers_alone,
    captions,
    letters,
    responses,
    submitted,
    whole_lines,
    with_question_id,
)
from evaluation.scoring.captions import score_captions
from evaluation.scoring.mathvista import score_mathvista
from evaluation.scoring.mmmu import score_mmmu
from evaluation.scoring.ocrbench import score_ocrbench
from evaluation.scoring.score import Line, Scorer
from evaluation.scoring.short_answers import (
    anls,
    anls_official,
    equal_to_one,
    exact_match,
    exact_match_official,
    holds_one,
    relaxed_accuracy,
    relaxed_accuracy_official,
    score_by,
    vqa_accuracy,
    vqa_accuracy_official,
)
from evaluation.scoring.video_mme import score_video_mme
from nvlm.program.errors import UserError, shown

DEFAULT_MAX_NEW_TOKENS = 128
"""Megatron-LM's default. Its script for NVLM-D says 16, which cuts OCRBench's formulas short."""


@dataclass(frozen=True, slots=True)
class Task:
    """A row."""

    name: str  # Megatron-LM's spelling
    read: Callable[[Location], DataSet]  # makes samples of files
    score: Scorer  # of its lines
    form: LineForm = ANSWER_LINE  # of its answer lines
    # "packed": a --gt_path, or a copy from the hub that holds the truth.
    gt_file: Literal["needed", "packed", "none"] = "needed"
    max_num_tiles: int | None = None  # None: the engine's own number
    unit: str = "%"  # of the score
    default_split: str | None = None  # of a data set that may be packed
    merged_form: MergedForm = whole_lines  # of all partitions in one file
    submission: MergedForm | None = None  # what the benchmark's server takes; None: it has none
    has_one_truth: bool = False  # a sample has one right answer
    # The truth is or may be missing from the lines, or the server wants questions that were not
    # asked.
    scored_with_gt_path: bool = False
    scored_with: tuple[str, ...] = ()  # packages, and `java`, that the scorer needs


TASKS = {
    task.name: task
    for task in (
        Task(
            "captioning",
            read_captions,
            score_captions,
            SampleLine(("caption",)),
            unit="CIDEr",
            merged_form=captions,
            scored_with_gt_path=True,
            scored_with=("pycocoevalcap", "java"),
        ),
        Task(
            "TextVQA",
            partial(read_questions, keys=TEXT_VQA),
            score_by(vqa_accuracy, leaving_one_person_out=vqa_accuracy_official),
            gt_file="packed",
            default_split=TEXT_VQA.split,
            merged_form=answers_alone,
            submission=submitted("question_id"),
        ),
        Task(
            "VQAv2",
            read_vqa_v2,
            score_by(vqa_accuracy, leaving_one_person_out=vqa_accuracy_official),
            gt_file="packed",
            default_split=VQA_V2.split,
            merged_form=with_question_id,
            submission=submitted("question_id"),
            scored_with_gt_path=True,
        ),
        Task(
            "ChartQA",
            partial(read_questions, keys=CHART_QA),
            score_by(relaxed_accuracy, by_the_rules_of_ChartQA=relaxed_accuracy_official),
            gt_file="packed",
            default_split=CHART_QA.split,
            merged_form=with_question_id,
            has_one_truth=True,
        ),
        Task(
            "SPDocVQA",
            partial(read_questions, keys=SP_DOC_VQA),
            score_by(anls, as_it_is_written=anls_official),
            gt_file="packed",
            default_split=SP_DOC_VQA.split,
            merged_form=answers_alone,
            submission=submitted("questionId"),
            scored_with=("rapidfuzz",),
        ),
        Task(
            "InfoVQA",
            partial(read_questions, keys=INFO_VQA),
            score_by(anls, as_it_is_written=anls_official),
            gt_file="packed",
            default_split=INFO_VQA.split,
            merged_form=answers_alone,
            submission=submitted("questionId"),
            scored_with=("rapidfuzz",),
        ),
        Task(
            "MMMU",
            read_mmmu,
            score_mmmu,
            SampleLine(("text", "prediction")),
            gt_file="none",
            default_split=MMMU_SPLIT,
            merged_form=letters,
            submission=letters,
            scored_with_gt_path=True,
        ),
        Task(
            "MathVista",
            read_mathvista,
            score_mathvista,
            gt_file="none",
            default_split=MATHVISTA_SPLIT,
            submission=responses,
            has_one_truth=True,
        ),
        Task(
            "OCRBench",
            read_ocrbench,
            score_ocrbench,
            gt_file="packed",
            unit="points",
            default_split=OCR_BENCH.split,
        ),
        Task(
            "AI2D",
            read_ai2d,
            score_by(exact_match, as_it_is_written=exact_match_official),
            gt_file="packed",
            default_split=AI2D.split,
            merged_form=answers_alone,
            has_one_truth=True,
        ),
        Task(
            "RealworldQA",
            read_realworld_qa,
            score_by(exact_match, as_it_is_written=exact_match_official),
            gt_file="packed",
            default_split=REALWORLD_QA.split,
            merged_form=with_question_id,
            has_one_truth=True,
        ),
        Task("VideoMME", read_video_mme, score_video_mme, VideoLine(), max_num_tiles=1),
        Task("custom", read_custom, score_by(equal_to_one, holds_one=holds_one)),
    )
}

_ALIASES = {"docvqa": "SPDocVQA", "infographicvqa": "InfoVQA"}


def find_task(name: str) -> Task:
    """By name, in upper or lower case."""
    lowered = name.lower().replace("-", "").replace("_", "")
    by_lower_case = {task.lower(): task for task in TASKS}
    found = by_lower_case.get(lowered) or _ALIASES.get(lowered)
    if found is None:
        raise UserError(f"--task {shown(name)} is unknown, expected one of {', '.join(TASKS)}")
    return TASKS[found]


def answer_line(task: Task, sample: Sample, prompt: str, text: str) -> Line:
    """As Megatron-LM's branch NVLM-1.0: an answer is its first line that is not empty."""
    return task.form.line(sample, prompt, text.strip().split("\n")[0])
