"""The answers of one partition while they are made: a line each, as they come.

A run that was stopped is gone on with: whole lines stay, the beginning of one that a killed
process left is cut off, and samples that failed are asked again.
"""

from __future__ import annotations

import json
from pathlib import Path

from evaluation.sample import Sample, SampleId
from evaluation.scoring.score import Line
from evaluation.tasks import Task, line_id
from nvlm.errors import UserError
from runtime.line_file import LineFile


class ResultsFile:
    """Raises `UserError` for a file that holds anything but answers to these samples."""

    def __init__(self, path: Path, task: Task, samples: list[Sample]) -> None:
        self._task = task
        self._file = LineFile(path, "--output_path")
        self.finished: set[SampleId] = set()
        try:
            ids = {sample.id for sample in samples}
            lines, tail = self._file.read()
            for number, text in enumerate(lines, 1):
                self.finished.add(self._id(number, text, ids))
            self._file.cut_tail(tail)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Line) -> None:
        """ASCII, as the reference writes it."""
        self._file.append(json.dumps(line).encode())
        self.finished.add(line_id(self._task, line))

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _id(self, number: int, text: bytes, ids: set[SampleId]) -> SampleId:
        try:
            sample_id = line_id(self._task, json.loads(text))
            is_ours = sample_id in ids
        except (ValueError, TypeError, LookupError, RecursionError):
            is_ours = False
        if not is_ours:
            raise UserError(
                f"{self._file.name} line {number} is no {self._task.name} answer to a sample of "
                "this partition; choose another --output_path"
            )
        return sample_id
