"""JSONL files that a user gives: their lines, numbered, with one-line errors."""

from __future__ import annotations

from pathlib import Path

from nvlm.program.errors import UserError
from nvlm.program.file_kinds import is_device


def read_jsonl_lines(path: Path, flag: str) -> list[tuple[int, str]]:
    """(line number from 1, text) of every line that is not blank; a leading BOM is dropped.

    Only a newline ends a line: U+2028 and its kin may stand in a JSON string, and a carriage return
    alone between its tokens. `flag` names the
    command-line flag that gave `path`. Raises `UserError` when the file cannot be read as UTF-8;
    a pipe may be given, a device may not.
    """
    if is_device(path):
        raise UserError(f"{flag} {path} is a device, whose end may never come; give a JSONL file")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be read: {error.strerror}; give a JSONL file"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{flag} {path} is not UTF-8 and cannot be read ({error}); give a JSONL file"
        ) from None
    # Windows ends a line with both; a carriage return alone is a space between JSON's tokens.
    lines = [line.removesuffix("\r") for line in lines]
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
