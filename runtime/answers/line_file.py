"""A JSONL file that grows while a batch runs: one writer at a time, whole lines or none.

What the lines mean is the caller's; a killed run may leave the beginning of one at the end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError
from nvlm.program.file_kinds import is_pipe_or_device


class LineFile:
    """Opened for appending and locked; `flag` names the command-line flag that gave `path`."""

    def __init__(self, path: Path, flag: str) -> None:
        self.name = f"{flag} {path}"
        self._path = path
        if is_pipe_or_device(path):
            # Reading back what a pipe or device was given waits for ever.
            raise UserError(f"{self.name} is not a regular file; give the name of one")
        try:
            # Unbuffered: what fails to be written must not be written again by `close`.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be written: {error.strerror}; choose another"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"another process is writing {self.name}; wait for it or choose another"
            ) from None

    def read(self) -> tuple[list[bytes], bytes]:
        """The whole lines, and what stands behind the last newline."""
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}") from None
        end = data.rfind(b"\n") + 1
        return data[:end].splitlines(), data[end:]

    def cut_tail(self, tail: bytes) -> None:
        """Takes the unfinished line off that `read` returned."""
        self._file.truncate(self._file.seek(0, os.SEEK_END) - len(tail))
        self._file.seek(0, os.SEEK_END)  # truncating does not move the position

    def append(self, line: bytes) -> None:
        """Writes a line, whole or (on an error) not at all."""
        end = self._file.tell()
        rest = memoryview(line + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(end)
            reason = "its disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise UserError(
                f"{self.name} cannot be written: {reason}; mend that and run the same command "
                "again, it goes on where it stopped"
            ) from None

    def close(self) -> None:
        self._file.close()


def encode_line(values: dict[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, in an id
        return json.dumps(values).encode()
