"""Answers to a score, or to the file that a benchmark's server scores where the truth is hidden."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.asking.output_paths import derived_path
from evaluation.datasets.mmmu import read_mmmu_answers
from evaluation.datasets.records import RecordError, field, json_list, read_json, string_list
from evaluation.datasets.sample import SampleId
from evaluation.reporting.results import Results
from evaluation.reporting.submission import write_result, write_submission
from evaluation.scoring import mmmu
from evaluation.scoring.score import Line, TaskScore, Truth
from nvlm.program.errors import UserError


@dataclass(frozen=True, slots=True)
class Scored:
    """The answers of a task and their score."""

    results: Results  # the answers
    score: TaskScore | None  # None: the truth is hidden, and `submission` was written
    submission: Path | None = None  # file for the benchmark's server; None: `score` is there
    notes: list[str] = dataclasses.field(default_factory=list)  # what a reader must know


def score_results(results: Results, gt_path: Path | None) -> Scored:
    """Writes the merged answers, as the reference does, or the submission."""
    task = results.task
    truth = read_truth(results, gt_path)
    if is_hidden(results, truth):
        submission = write_submission(results, gt_path)
        return Scored(results, None, submission.path, submission.notes)
    if task.name == "VQAv2" and gt_path is not None:
        raise UserError(
            f"--gt_path {gt_path} goes with VQAv2's hidden answers, for the submission; these "
            "lines hold what is right, leave it out"
        )
    score = task.score(results.lines, truth)
    write_result(derived_path(results.prefix, task, "merged"), task.merged_form(results.lines))
    return Scored(results, score)


def read_truth(results: Results, gt_path: Path | None) -> Truth:
    """What the answer lines do not hold themselves."""
    if results.task.name == "MMMU":
        answers = _mmmu_answers(results, gt_path)
        if missing := [i for i in results.lines if str(i) not in answers]:
            raise UserError(
                f"the ground truth of MMMU has no {missing[0]} and {len(missing) - 1} more; give "
                "the MMMU repository's answer_dict_val.json as --gt_path"
            )
        return Truth(answers)
    if results.task.name == "captioning":
        captions = _captions(gt_path) if gt_path is not None else {}
        if missing := [
            i
            for i, line in results.lines.items()
            if not (captions.get(str(i)) or line.get("ground_truth"))
        ]:
            raise UserError(
                f"captioning has no captions of people for image {missing[0]} and "
                f"{len(missing) - 1} more; give the annotations as --gt_path"
            )
        return Truth(captions)
    return Truth()


def _captions(gt_path: Path) -> dict[str, Any]:
    """COCO's annotations by image_id."""
    captions: dict[str, list[str]] = defaultdict(list)
    for where, record in json_list(gt_path, "annotations"):
        try:
            image_id = field(record, "image_id", (int, str))
            captions[str(image_id)].append(field(record, "caption", str))
        except RecordError as error:
            raise _bad_truth(where, error) from None
    return dict(captions)


def _bad_truth(where: str, error: RecordError) -> UserError:
    return UserError(f"--gt_path {where} {error}; download the benchmark's file again")


def _mmmu_answers(results: Results, gt_path: Path | None) -> dict[str, Any]:
    if gt_path is not None:
        answers = read_json(gt_path)
        if not isinstance(answers, dict):
            raise UserError(
                f"--gt_path {gt_path} holds no answers by id, expected an object; give the MMMU "
                "repository's answer_dict_val.json"
            )
        for sample_id, answer in answers.items():
            try:
                if isinstance(field(answer, "ground_truth", (str, list)), list):
                    string_list(answer, "ground_truth")
            except RecordError as error:
                raise _bad_truth(f"{gt_path} entry {sample_id}", error) from None
        return answers
    if results.records and results.records[0].location.image_dir.is_dir():
        return read_mmmu_answers(results.records[0].location)
    raise UserError(
        "--task MMMU needs the answers: give the MMMU repository's answer_dict_val.json as "
        "--gt_path"
    )


def is_hidden(results: Results, truth: Truth) -> bool:
    """Whether no sample has a public answer. A mixture is refused."""
    hidden = [_is_hidden(results, i, line, truth) for i, line in results.lines.items()]
    if any(hidden) and not all(hidden):
        raise UserError(
            f"{results.prefix}-{results.task.name} has {sum(hidden)} answers of a split whose "
            f"truth is hidden among {len(hidden)}; score the splits apart"
        )
    return all(hidden)


def _is_hidden(results: Results, sample_id: SampleId, line: Line, truth: Truth) -> bool:
    if results.task.name == "MMMU":
        return bool(truth.answers[str(sample_id)]["ground_truth"] == mmmu.HIDDEN)
    return line.get("gt_answer") == [""]
