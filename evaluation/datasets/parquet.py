"""Hugging Face data sets as they are published: parquet files with the pictures in them.

Everything but the pictures is read at once; a picture is read, with its row group, when it is
asked for, so memory holds one row group of pictures for each file.
"""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.datasets.records import Record
from evaluation.packages import require_package
from nvlm.program.errors import UserError

_SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?\.parquet")
NO_PICTURES = re.compile("(?!)")


def parquet_files(folder: Path, split: str, beside: str = "") -> list[Path]:
    """The files of a split (validation-00000-of-00001.parquet) in a folder, its `data`, or its
    folder `beside`."""
    for place in (folder, folder / "data", folder / beside):
        if found := sorted(place.glob(f"{split}-*.parquet")):
            return found
    return []


def missing_files(paths: Iterable[Path]) -> list[str]:
    """A sentence for each file that the names of these promise (test-00000-of-00002) and that is
    not among them."""
    numbers: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for path in paths:
        if name := _SHARD.fullmatch(path.name):
            numbers[path.parent, name["split"], int(name["count"])].add(int(name["number"]))
    return [
        f"{folder} is missing {split}-{number:05}-of-{count:05}.parquet, which the names of the "
        "others promise; download it"
        for (folder, split, count), found in numbers.items()
        for number in range(count)
        if number not in found
    ]


class ParquetFile:
    def __init__(self, path: Path, picture_columns: re.Pattern[str], purpose: str) -> None:
        parquet = require_package("pyarrow.parquet", "pyarrow", purpose)
        self.path = path
        try:
            self._file: Any = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise self._damaged(error) from None
        names: list[str] = self._file.schema_arrow.names
        self.picture_columns = [name for name in names if picture_columns.fullmatch(name)]
        self.columns = [name for name in names if name not in self.picture_columns]
        self._lock = threading.Lock()
        self._held: tuple[int, str, list[Any]] | None = None

    def _damaged(self, error: Exception) -> UserError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return UserError(f"{self.path} is not a whole parquet file ({reason}); download it again")

    def records(self) -> list[tuple[str, Record]]:
        """(where it stands, values); a picture column holds a function that reads the picture."""
        try:
            rows: list[Record] = self._file.read(self.columns).to_pylist()
        except (OSError, ValueError) as error:
            raise self._damaged(error) from None
        for number, row in enumerate(rows):
            row |= {name: self._reader(number, name) for name in self.picture_columns}
        return [(f"{self.path} row {number}", row) for number, row in enumerate(rows)]

    def _reader(self, number: int, column: str) -> Callable[[], bytes]:
        group = 0
        while number >= (length := self._file.metadata.row_group(group).num_rows):
            group, number = group + 1, number - length
        return partial(self._picture, group, number, column)

    def _picture(self, group: int, number: int, column: str) -> bytes:
        with self._lock:
            if self._held is None or self._held[:2] != (group, column):
                try:
                    table = self._file.read_row_group(group, [column])
                except (OSError, ValueError) as error:
                    raise self._damaged(error) from None
                self._held = (group, column, table.column(column).to_pylist())
            picture = self._held[2][number]
        encoded = picture.get("bytes") if isinstance(picture, dict) else picture
        if not isinstance(encoded, bytes):
            raise UserError(f"{self.path} has no picture {column} in row {number} of group {group}")
        return encoded
