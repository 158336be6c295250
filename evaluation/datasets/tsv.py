"""VLMEvalKit's TSV files: a row a question, with its picture in base64 or the index of another row.

Everything but the pictures is read at once; a picture is read from its place in the file when it is
asked for.
"""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path

from evaluation.datasets.records import Record, RecordError
from nvlm.program.errors import UserError, shown

_PICTURE, _INDEX = "image", "index"
_LONGEST_INDEX = 64  # characters of a picture column that are another row's index


def tsv_records(path: Path) -> list[tuple[str, Record | RecordError]]:
    """(where it stands, values by column); `image` holds a function that reads the picture, other
    columns text, and empty ones are left out. Raises `UserError` for a file without these columns.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, "rb") as file:
            return _records(path, file)
    except OSError as error:
        raise UserError(
            f"--gt_path {path} cannot be read: {error.strerror}; give VLMEvalKit's file"
        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"--gt_path {path} is not a whole TSV file ({error}); download it again"
        ) from None


def _records(path: Path, file: BufferedReader) -> list[tuple[str, Record | RecordError]]:
    rows = _rows(file)
    _, columns = next(rows, (0, []))
    if missing := {_INDEX, _PICTURE, "question"} - set(columns):
        raise UserError(
            f"--gt_path {path} has no column {' nor '.join(sorted(missing))}, expected index, "
            "image, question and answer; give a TSV file of VLMEvalKit"
        )
    found: list[tuple[str, Record | RecordError]] = []
    places: dict[str, int] = {}  # index -> where its row with a picture of its own begins
    pictures: list[tuple[Record, str]] = []
    for number, (start, values) in enumerate(rows):
        where = f"{path} row {number}"
        if len(values) != len(columns):
            error = RecordError(f"has {len(values)} columns, expected {len(columns)}")
            found.append((where, error))
            continue
        record: Record = {name: value for name, value in zip(columns, values, strict=True) if value}
        picture = record.pop(_PICTURE, "")
        index = record.get(_INDEX, "")
        if len(picture) > _LONGEST_INDEX:
            places[index] = start
        pictures.append((record, index if len(picture) > _LONGEST_INDEX else picture))
        found.append((where, record))
    column = columns.index(_PICTURE)
    for record, index in pictures:
        record[_PICTURE] = _reader(path, places.get(index), column, index)
    return found


def _rows(file: BufferedReader) -> Iterator[tuple[int, list[str]]]:
    """(where it begins, its values) of every row; a quoted value may hold line breaks."""
    position = 0

    def lines() -> Iterator[str]:
        nonlocal position
        for line in file:
            position += len(line)
            yield line.decode("utf-8-sig" if position == len(line) else "utf-8")

    rows = csv.reader(lines(), delimiter="\t", strict=True)
    while True:
        start = position
        try:
            values = next(rows)
        except StopIteration:
            return
        if values:
            yield start, values


def _reader(path: Path, start: int | None, column: int, index: str) -> Callable[[], bytes]:
    if start is None:

        def missing() -> bytes:
            raise UserError(
                f"{path} has no picture of its own in the row with index {shown(index)}"
            )

        return missing
    return partial(_picture, path, start, column)


def _picture(path: Path, start: int, column: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        _, values = next(_rows(file))
    try:
        return base64.b64decode(values[column], validate=True)
    except binascii.Error as error:
        raise UserError(f"{path} holds a picture that is not base64: {error}") from None
