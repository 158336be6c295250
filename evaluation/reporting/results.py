"""The answers of all partitions, read for scoring: a sample counts once, a broken line is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evaluation.asking.output_paths import answers_paths, record_path
from evaluation.asking.task_record import TaskRecord
from evaluation.datasets.records import RecordError
from evaluation.datasets.sample import SampleId
from evaluation.reporting.merging import FoundLine, merge
from evaluation.scoring.scorable import scorable_id
from evaluation.scoring.score import Line
from evaluation.tasks import Task
from nvlm.program.errors import UserError

_MAX_NAMED = 100
"""Partitions that are missing are named one by one, so many of them."""


@dataclass(frozen=True, slots=True)
class Results:
    """The answers of a task."""

    prefix: Path  # how the names of the files begin
    task: Task  # row of the benchmark
    lines: dict[SampleId, Line]  # in the order of their ids
    records: list[TaskRecord]  # of the files that `evaluate.py generate` wrote
    problems: list[str]  # a sentence for each line that is no answer and for what is missing
    num_duplicates: int  # lines that repeat a sample of another file


def read_results(prefix: Path, task: Task, flag: str = "--input_path") -> Results:
    """Raises `UserError` when there is no answer at all."""
    paths = answers_paths(prefix, task)
    found: list[FoundLine] = []
    problems: list[str] = []
    for path in paths:
        for number, text in _lines(path, flag):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                problems.append(f"{path} line {number} is not JSON and is left out")
                continue
            try:
                sample_id = scorable_id(task, line)
            except RecordError as error:
                problems.append(
                    f"{path} line {number} is no {task.name} answer and is left out: it {error}"
                )
                continue
            found.append(FoundLine(sample_id, line, path, number))
    if not found and problems:
        raise UserError(
            f"{flag} {prefix} has no {task.name} answer to score: {problems[0]}; give the "
            "--output_path of evaluate.py generate, or one of its files of answers (.jsonl)"
        )
    if not found:
        raise UserError(
            f"{flag} {prefix} has no {task.name} answers (looked for "
            f"{prefix}-{task.name}-dprank=*-partition=*.jsonl); give the --output_path of "
            "evaluate.py generate"
        )
    records = [TaskRecord.read(p) for p in map(record_path, paths) if p.is_file()]
    merged = merge(task, found, bool(records))
    problems += _missing(prefix, task, records, len(merged.lines))
    return Results(prefix, task, merged.lines, records, problems, merged.num_duplicates)


def _lines(path: Path, flag: str) -> list[tuple[int, bytes]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    return [(number, text) for number, text in enumerate(data.split(b"\n"), 1) if text.strip()]


def _missing(prefix: Path, task: Task, records: list[TaskRecord], num_lines: int) -> list[str]:
    """Partitions and samples that the records promise and that are missing from the files."""
    if not records:
        return []
    found = {record.partition_id for record in records}
    number = records[0].num_partitions
    missing = (partition_id for partition_id in range(number) if partition_id not in found)
    problems = [
        f"{prefix}-{task.name} is missing partition {partition_id} of {number}"
        for partition_id in islice(missing, _MAX_NAMED)
    ]
    if number - len(found) > _MAX_NAMED:
        problems.append(
            f"{prefix}-{task.name} is missing {number - len(found)} of {number} partitions"
        )
    problems += [
        f"{prefix}-{task.name} partition {record.partition_id} was made by another engine or with "
        f"other settings than partition {records[0].partition_id}"
        for record in records
        if record.decisive != records[0].decisive
    ]
    if num_bad := sum(record.num_bad_records for record in records):
        problems.append(
            f"{prefix}-{task.name} is missing records of the data set that were no samples when "
            f"they were read: {num_bad}; fix the data set and run the same command again"
        )
    if num_parts := max(record.num_missing_parts for record in records):
        problems.append(
            f"{prefix}-{task.name} was asked of a data set with missing parts: {num_parts}; "
            "download them and run the same command again"
        )
    expected = sum(record.num_samples for record in records)
    if num_lines < expected:
        problems.append(
            f"{prefix}-{task.name} has {num_lines} of {expected} answers; run the same "
            "command again to resume with the rest"
        )
    return problems
