"""Answers as JSON objects, one a line, in the order of the requests; resumable after a stop."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError
from runtime.answers.line_file import LineFile, encode_line
from runtime.requests.types import GenerationResult


def answer_json(result: GenerationResult) -> dict[str, Any]:
    """A result as a JSON object, text first."""
    values = asdict(result)
    timings = {name: round(value, 3) for name, value in values.pop("timings").items()}
    return {**values, "timings": timings}


class AnswerFile:
    """Answers to requests with `ids`, appended behind those the file already holds.

    Raises `UserError` for a file that holds anything but answers to these ids: nobody's lines are
    ever lost. Only the beginning of the next answer, which a killed run leaves, is cut off.
    """

    def __init__(self, path: Path, ids: list[Any]) -> None:
        self._ids = ids
        self._file = LineFile(path, "--output_file")
        try:
            self._take_over()
        except BaseException:
            self._file.close()
            raise

    def _take_over(self) -> None:
        """Counts what the file holds: nobody else writes from here on."""
        lines, tail = self._file.read()
        answers = [self._parse(number, text) for number, text in enumerate(lines, 1)]
        self.num_finished = len(answers)
        self.num_errors = sum("error" in answer for answer in answers)
        if tail and not self._begins_next_answer(tail):
            raise self._foreign(self.num_finished + 1)
        self._file.cut_tail(tail)

    def append(self, answer: dict[str, Any]) -> None:
        """Writes the next answer, whole or (on an error) not at all."""
        self._file.append(encode_line(answer))
        self.num_finished += 1
        self.num_errors += "error" in answer

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _parse(self, number: int, text: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(text)
            is_answer = answer["id"] == self._ids[number - 1] and answer.keys() & {"text", "error"}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            is_answer = False
        if not is_answer:
            raise self._foreign(number)
        return dict(answer)

    def _begins_next_answer(self, tail: bytes) -> bool:
        if self.num_finished == len(self._ids):
            return False
        start = encode_line({"id": self._ids[self.num_finished]})[:-1]  # without the brace
        return tail.startswith(start) or start.startswith(tail)

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"{self._file.name} line {number} is not an answer to this input file; choose "
            "another output file"
        )
