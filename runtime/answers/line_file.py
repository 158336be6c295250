"""A JSONL file that grows while a batch runs: one writer at a time, whole lines or none.

What the lines mean is the caller's; a killed run may leave the beginning of one at the end.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError
from nvlm.program.file_kinds import is_pipe_or_device
from nvlm.program.locks import lock


class LineFile:
    """Opened for appending and locked; `flag` names the command-line flag that gave `path`."""

    def __init__(self, path: Path, flag: str) -> None:
        self.name = f"{flag} {path}"
        self._path = path
        if is_pipe_or_device(path):
            # Reading back what a pipe or device was given waits for ever.
            raise UserError(f"{self.name} is not a regular file; give the name of one")
        self._file = self._locked(path)
        if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(path)):
            self._file.close()  # another process has put a file in its place meanwhile
            raise self._is_taken()

    def _locked(self, path: Path) -> FileIO:
        try:
            # Unbuffered: what fails to be written must not be written again by `close`.
            file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"{self.name} cannot be written: {error.strerror}; choose another"
            ) from None
        try:
            lock(file.fileno(), self.name)
        except BlockingIOError:
            file.close()
            raise self._is_taken() from None
        except OSError as error:
            file.close()
            raise UserError(
                f"{self.name} cannot be locked: {error.strerror}; choose another"
            ) from None
        return file

    def _is_taken(self) -> UserError:
        return UserError(f"another process is writing {self.name}; wait for it or choose another")

    def read(self) -> tuple[list[bytes], bytes]:
        """The whole lines, and what stands after the last newline."""
        try:
            data = self._path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error.strerror}") from None
        end = data.rfind(b"\n") + 1
        return data[:end].split(b"\n")[:-1], data[end:]

    def cut_tail(self, tail: bytes) -> None:
        """Takes the unfinished line off that `read` returned."""
        self._file.truncate(self._file.seek(0, os.SEEK_END) - len(tail))
        self._file.seek(0, os.SEEK_END)  # truncating does not move the position

    def append(self, line: bytes) -> None:
        """Writes a line, whole or (on an error) not at all."""
        end = self._file.tell()
        try:
            _write(self._file, line + b"\n")
        except OSError as error:
            self._file.truncate(end)
            raise self._cannot_write(error) from None

    def replace(self, lines: Mapping[int, bytes]) -> None:
        """Puts other lines in the place of some, by their index, all or (on an error) none. The
        file is written anew beside itself and takes its own place, locked all the time."""
        found, tail = self.read()
        assert not tail, "a line is being written"
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            temporary.unlink(missing_ok=True)
            file = self._locked(temporary)
            try:
                _write(file, b"".join(lines.get(i, line) + b"\n" for i, line in enumerate(found)))
                os.fsync(file.fileno())
                os.replace(temporary, self._path)
            except BaseException:
                file.close()
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self._cannot_write(error) from None
        self._file.close()
        self._file = file

    def _cannot_write(self, error: OSError) -> UserError:
        reason = "its disk is full" if error.errno == errno.ENOSPC else error.strerror
        return UserError(
            f"{self.name} cannot be written: {reason}; fix that and run the same command again, it "
            "resumes where it stopped"
        )

    def close(self) -> None:
        self._file.close()


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def encode_line(values: dict[str, Any]) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, in an id
        return json.dumps(values).encode()
