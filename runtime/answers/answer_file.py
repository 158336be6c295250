"""Answers as JSON objects, one a line, in the order of the requests; resumable after a stop."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError
from runtime.answers.line_file import LineFile, encode_line
from runtime.requests.types import GenerationResult

_SAVE_S = 30.0  # a killed run loses at most so many seconds of answers that replace others


def answer_json(result: GenerationResult) -> dict[str, Any]:
    """A result as a JSON object, text first. What was not asked for is left out, and `choices` of
    one answer, which they would repeat; so is what depends on the requests before this one."""
    values = asdict(result)
    del values["num_reused_tokens"]
    timings = {name: round(value, 3) for name, value in values.pop("timings").items()}
    choices = values.pop("choices")
    if len(choices) > 1:
        values["choices"] = [_asked(choice) for choice in choices]
    return {**_asked(values), "timings": timings}


def _asked(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def failed_ids(path: Path) -> list[Any]:
    """The ids of a finished file's errors, in its order."""
    answers = map(json.loads, path.read_bytes().split(b"\n")[:-1])
    return [answer["id"] for answer in answers if "error" in answer]


class AnswerFile:
    """Answers to requests with `ids`, appended after those the file already holds. `failed` are the
    indices of those that are errors: they may be replaced by answers.

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
        self.failed = [index for index, answer in enumerate(answers) if "error" in answer]
        self._replaced: dict[int, bytes] = {}  # not in the file yet
        self._saved = time.monotonic()
        if tail and not self._begins_next_answer(tail):
            raise self._foreign(self.num_finished + 1)
        self._file.cut_tail(tail)

    def append(self, answer: dict[str, Any]) -> None:
        """Writes the next answer, whole or (on an error) not at all."""
        self._file.append(encode_line(answer))
        if "error" in answer:
            self.failed.append(self.num_finished)
        self.num_finished += 1

    def replace(self, index: int, answer: dict[str, Any]) -> None:
        """Puts an answer in the place of a failed one: in the file soon, and once it is closed."""
        self._replaced[index] = encode_line(answer)
        if "error" not in answer:
            self.failed.remove(index)
        if time.monotonic() - self._saved > _SAVE_S:
            self._save()

    def _save(self) -> None:
        if self._replaced:
            self._file.replace(self._replaced)
            self._replaced = {}
        self._saved = time.monotonic()

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._save()
        finally:
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
