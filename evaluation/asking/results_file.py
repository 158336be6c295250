"""The answers of one partition while they are made: a line each, as they come.

A run that was stopped is resumed: whole lines stay, the beginning of one that a killed
process left is cut off, and samples that failed are asked again.
"""

from __future__ import annotations

import json
from pathlib import Path

from evaluation.datasets.records import RecordError
from evaluation.datasets.sample import Sample, SampleId
from evaluation.scoring.score import Line
from evaluation.tasks import Task
from nvlm.program.errors import UserError
from runtime.answers.line_file import LineFile


class ResultsFile:
    """Raises `UserError` for a file that holds anything but answers to these samples. `finished`:
    the digest of what was asked, by sample."""

    def __init__(self, path: Path, task: Task, samples: list[Sample]) -> None:
        self._task = task
        self._file = LineFile(path, "--output_path")
        self.finished: dict[SampleId, bytes] = {}
        try:
            ids = {sample.id for sample in samples}
            lines, tail = self._file.read()
            for number, text in enumerate(lines, 1):
                sample_id, digest = self._read(number, text, ids)
                self.finished[sample_id] = digest
            self._file.cut_tail(tail)
        except BaseException:
            self._file.close()
            raise

    def append(self, line: Line) -> None:
        """ASCII, as the reference writes it."""
        self._file.append(json.dumps(line).encode())
        self.finished[self._task.form.id(line)] = self._task.form.digest(line)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self, number: int, text: bytes, ids: set[SampleId]) -> tuple[SampleId, bytes]:
        try:
            line = json.loads(text)
            sample_id = self._task.form.id(line)
            if sample_id in ids:
                return sample_id, self._task.form.digest(line)
        except (ValueError, RecursionError, RecordError):
            pass
        raise UserError(
            f"{self._file.name} line {number} is no {self._task.name} answer to a sample of this "
            "partition; choose another --output_path"
        )
