"""The file that a benchmark's server scores, where the truth is hidden."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from evaluation.asking.output_paths import derived_path
from evaluation.datasets.records import RecordError, field, json_list
from evaluation.datasets.sample import SampleId
from evaluation.reporting.results import Results
from evaluation.scoring.score import Line
from nvlm.program.errors import UserError
from nvlm.program.json_files import write_text_atomically

_ALL_OF_VQA_V2 = "v2_OpenEnded_mscoco_test2015_questions.json"


@dataclasses.dataclass(frozen=True, slots=True)
class Submission:
    path: Path  # of the file for the benchmark's server
    notes: list[str] = dataclasses.field(default_factory=list)  # what its reader must know


def write_submission(results: Results, gt_path: Path | None) -> Submission:
    """`gt_path`: VQAv2's questions of test2015. EvalAI takes a file that answers all of them alone,
    in the phase test-dev too; those that were not asked get the empty answer."""
    task, lines = results.task, results.lines
    if task.submission is None:
        raise UserError(
            f"the answers to this split of {task.name} are hidden and its server takes no file of "
            "answers alone; use the public split"
        )
    notes: list[str] = []
    if task.name == "VQAv2" and gt_path is not None:
        lines = _with_all_questions(lines, gt_path)
    elif task.name == "VQAv2" and not _asked_all(results):
        notes.append(
            "EvalAI takes the file only with all questions of test2015, in the phase test-dev "
            f"too: give {_ALL_OF_VQA_V2} as --gt_path, what was not asked gets no answer."
        )
    path = derived_path(results.prefix, task, "submission")
    write_result(path, task.submission(lines))
    return Submission(path, notes)


def _asked_all(results: Results) -> bool:
    return any(
        path.name == _ALL_OF_VQA_V2
        for record in results.records
        for path in record.location.gt_paths
    )


def _with_all_questions(lines: dict[SampleId, Line], gt_path: Path) -> dict[SampleId, Line]:
    found: dict[SampleId, Line] = {}
    for where, record in json_list(gt_path, "questions"):
        try:
            question_id = field(record, "question_id", (int, str))
        except RecordError as error:
            raise UserError(
                f"--gt_path {where} {error}; download the benchmark's file again"
            ) from None
        found[question_id] = lines.get(question_id, {"answer": ""})
    if unknown := lines.keys() - found.keys():
        raise UserError(
            f"--gt_path {gt_path} has no question {min(unknown, key=str)}, which was answered, "
            f"and {len(unknown) - 1} more; give {_ALL_OF_VQA_V2}"
        )
    return found


def write_result(path: Path, value: Any) -> None:
    try:
        write_text_atomically(path, json.dumps(value, indent=4, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; fix that, or copy the answers to where "
            "it can and give their --input_path"
        ) from None
