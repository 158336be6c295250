"""JSON records of a ground-truth file, each read on its own: a bad one is named alone."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from evaluation.datasets.sample import DataSet, Sample
from nvlm.program.errors import UserError, shown
from nvlm.program.file_kinds import is_device
from nvlm.program.jsonl import read_jsonl_lines

Record = dict[str, Any]
_MAX_SHOWN = 80
"""Characters of a name that is none."""


class RecordError(Exception):
    """What is wrong with one record."""


def read_json(path: Path) -> Any:
    """The JSON value in a ground-truth file."""
    if is_device(path):
        raise UserError(f"--gt_path {path} is a device; give the benchmark's file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"--gt_path {path} cannot be read: {error.strerror}; give the benchmark's file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--gt_path {path} is not valid JSON ({error}); download the benchmark's file again"
        ) from None


def json_list(path: Path, key: str | None = None) -> list[tuple[str, Any]]:
    """(where it stands, record) of a file that holds a list, or an object with one under `key`."""
    return list_in(read_json(path), path, key)


def list_in(value: Any, path: Path, key: str | None = None) -> list[tuple[str, Any]]:
    """`json_list` of a value that was read already."""
    if key is not None and isinstance(value, dict):
        value = value.get(key)
    if not isinstance(value, list):
        expected = "a list" + (f" or an object with a list {key!r}" if key else "")
        raise UserError(
            f"--gt_path {path} holds no list of records, expected {expected}; give the "
            "benchmark's file"
        )
    return [(f"{path} record {index}", record) for index, record in enumerate(value)]


def json_lines(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, record or the error) of a JSONL file."""
    records: list[tuple[str, Any]] = []
    for number, line in read_jsonl_lines(path, "--gt_path"):
        where = f"{path} line {number}"
        try:
            records.append((where, json.loads(line)))
        except (ValueError, RecursionError) as error:
            records.append((where, RecordError(f"is not JSON ({error})")))
    return records


def field(record: Any, key: str, types: type | tuple[type, ...]) -> Any:
    """A required value of one of `types`."""
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, dict):
        raise RecordError(f"is a {type(record).__name__}, expected an object")
    if key not in record:
        raise RecordError(f"has no {key!r}")
    value = record[key]
    if not isinstance(value, types) or isinstance(value, bool):
        names = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise RecordError(f"has {key} {shown(value)}, expected {names}")
    return value


def answer(record: Any, key: str) -> str:
    """The answer of a record; for benchmarks that hide none."""
    value: str = field(record, key, str)
    if not value.strip():
        raise RecordError(f"has {key} {shown(value)}, expected an answer")
    return value


def string_list(record: Any, key: str) -> list[str]:
    values = field(record, key, list)
    if not all(isinstance(value, str) for value in values):
        raise RecordError(f"has {key} {shown(values)}, expected a list of strings")
    return list(values)


def named_file(folder: Path, record: Any, key: str) -> Path:
    """The file that a record names, there or not. Raises `RecordError` for a name that no file can
    have."""
    name: str = field(record, key, str)
    path = folder / name
    try:
        path.stat()
    except (OSError, ValueError) as error:  # a null character, or half of a surrogate pair
        if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
            start = name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}..."
            raise RecordError(f"has {key} {shown(start)}, which no file can be named") from None
    return path


def collect(
    records: Iterable[tuple[str, Any]],
    read: Callable[[int, Any], Sample | Iterator[Sample | RecordError]],
    incomplete: Iterable[str] = (),
) -> DataSet:
    """Reads (position, record) one by one; the first sample of an id counts."""
    parts: list[list[Sample | str]] = []
    places: dict[Any, str] = {}
    for position, (where, record) in enumerate(records):
        parts.append([])
        for part in _parts(read, position, record):
            if isinstance(part, RecordError):
                parts[-1].append(f"{where} {part}")
            elif part.id in places:
                first = places[part.id]
                parts[-1].append(f"{where} has the id {shown(part.id)} of {first}, which counts")
            else:
                places[part.id] = where
                parts[-1].append(part)
    return DataSet(parts, list(incomplete))


def _parts(
    read: Callable[[int, Any], Sample | Iterator[Sample | RecordError]], position: int, record: Any
) -> list[Sample | RecordError]:
    try:
        found = read(position, record)
        return [found] if isinstance(found, Sample) else list(found)
    except RecordError as error:
        return [error]
