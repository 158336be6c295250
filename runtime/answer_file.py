"""Answers as JSON objects, one a line, in the order of the requests; resumable after a stop."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvlm.errors import UserError
from runtime.types import GenerationResult


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
        self._path = path
        self._ids = ids
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            # Reading back what a pipe or device was given waits for ever.
            raise UserError(f"--output_file {path} is not a regular file; give the name of one")
        try:
            # Unbuffered: what fails to be written must not be written again by `close`.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--output_file {path} cannot be written: {error.strerror}") from None
        try:
            self._take_over()
        except BaseException:
            self._file.close()
            raise

    def _take_over(self) -> None:
        """Locks the file, then counts what it holds: nobody else writes from here on."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing --output_file {self._path}; wait for it or choose "
                "another"
            ) from None
        data = self._read()
        whole, tail = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        answers = [self._parse(number, text) for number, text in enumerate(whole.splitlines(), 1)]
        self.num_finished = len(answers)
        self.num_errors = sum("error" in answer for answer in answers)
        if tail and not self._begins_next_answer(tail):
            raise self._foreign(self.num_finished + 1)
        self._file.truncate(len(whole))
        self._file.seek(0, os.SEEK_END)  # truncating does not move the position

    def append(self, answer: dict[str, Any]) -> None:
        """Writes the next answer, whole or (on an error) not at all."""
        end = self._file.tell()
        line = memoryview(_encode(answer) + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self._file.truncate(end)
            reason = "its disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise UserError(
                f"--output_file {self._path} cannot be written: {reason}; mend that and run the "
                "same command again, it goes on where it stopped"
            ) from None
        self.num_finished += 1
        self.num_errors += "error" in answer

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _read(self) -> bytes:
        try:
            return self._path.read_bytes()
        except OSError as error:
            raise UserError(
                f"--output_file {self._path} cannot be read: {error.strerror}"
            ) from None

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
        start = _encode({"id": self._ids[self.num_finished]})[:-1]  # without the brace
        return tail.startswith(start) or start.startswith(tail)

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"--output_file {self._path} line {number} is not an answer to this input file; choose "
            "another output file"
        )


def _encode(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, in an id
        return json.dumps(answer).encode()
