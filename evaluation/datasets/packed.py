"""Benchmarks with their pictures in the rows: parquet files of the hub, and VLMEvalKit's TSV.

Their rows become records under the benchmark's own keys, so that its reader need not know the form.
The picture of a record is a function that reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.datasets.literal_list import literal_list
from evaluation.datasets.parquet import ParquetFile, missing_files, parquet_files
from evaluation.datasets.records import Record, RecordError
from evaluation.datasets.sample import Location
from evaluation.datasets.tsv import tsv_records
from nvlm.program.errors import UserError

PARQUET, TSV = ".parquet", ".tsv"
PICTURE = "image"
"""The column of the picture, in either form."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a benchmark is packed."""

    repositories: str  # copies on the hub, to name in messages
    picture: str  # the benchmark's key of the picture
    # The benchmark's key -> the columns that may hold it, of which the first that a row has counts.
    columns: dict[str, tuple[str, ...]]
    split: str = "test"  # what is read of a copy unless `--split` says otherwise
    folder: str = ""  # where its files may lie in a copy
    numbers: tuple[str, ...] = ()  # keys whose digits become numbers


def is_packed(path: Path) -> bool:
    return path.suffix.lower() in (PARQUET, TSV)


def packed_records(
    location: Location, packing: Packing, task: str
) -> tuple[list[tuple[str, Any]], list[str]] | None:
    """(where it stands, record or its error) of every row, and a sentence for each missing file.

    None where --gt_path names files of the benchmark's own form. Raises `UserError` where there is
    neither a --gt_path nor a parquet file of the split.
    """
    paths = list(location.gt_paths)
    if paths and not any(map(is_packed, paths)):
        return None
    if len({path.suffix.lower() for path in paths}) > 1:
        raise UserError(
            f"--gt_path names {' and '.join(map(str, paths))}, expected files of one form; give "
            "those of one"
        )
    split = location.split or packing.split
    paths = paths or parquet_files(location.image_dir, split, packing.folder)
    if not paths:
        raise UserError(
            f"--input_image_path {location.image_dir} has no {split}-*.parquet; give a copy of "
            f"the data set {packing.repositories}, or the images and the benchmark's questions as "
            "--gt_path"
        )
    if paths[0].suffix.lower() == TSV:
        rows: list[tuple[str, Any]] = [row for path in paths for row in tsv_records(path)]
        return [(where, _from_tsv(row, packing)) for where, row in rows], []
    files = [ParquetFile(path, re.compile(PICTURE), task) for path in paths]
    for file in files:
        if not file.picture_columns:
            raise UserError(
                f"{file.path} has the columns {', '.join(file.columns)}, expected one called "
                f"{PICTURE}; give a copy of the data set {packing.repositories}"
            )
    rows = [row for file in files for row in file.records()]
    return [(where, _renamed(row, packing)) for where, row in rows], missing_files(paths)


def _from_tsv(row: Record | RecordError, packing: Packing) -> Record | RecordError:
    """A value that is written as a Python list becomes one, as VLMEvalKit reads it."""
    if isinstance(row, RecordError):
        return row
    return _renamed({name: _literal(value) for name, value in row.items()}, packing)


def _literal(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        found = literal_list(value)
        return value if found is None else found
    return value


def _renamed(row: Record, packing: Packing) -> Record:
    """The row under the benchmark's keys; what it has beside them stays."""
    record = dict(row)
    picture = record.pop(PICTURE, None)
    for key, columns in packing.columns.items():
        present = [column for column in columns if row.get(column) is not None]
        if present:
            record[key] = _plain(row[present[0]])
        else:
            record.pop(key, None)
    for key in packing.numbers:
        if isinstance(value := record.get(key), str) and value.isdecimal():
            record[key] = int(value)
    record[packing.picture] = picture
    return record


def _plain(value: Any) -> Any:
    """VQA's people, a list of {"answer": ...}, as their answers."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return [item.get("answer") for item in value]
    return value
