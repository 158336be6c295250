"""Rows of a tensor on disk: the calibration samples' hidden states between two layers.

In memory is only the window that a layer works on, however many samples there are; and a run that
was interrupted finds the states of the layer it stopped at.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class RowFile:
    """A tensor of rows in a file: [num_rows, *row_shape]."""

    path: Path  # raw values without a header
    num_rows: int  # rows in the whole file
    row_shape: tuple[int, ...]  # of one row
    dtype: torch.dtype  # of the values

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    def windows(self, max_rows: int) -> Iterator[range]:
        """All rows in order, `max_rows` at a time."""
        for start in range(0, self.num_rows, max_rows):
            yield range(start, min(start + max_rows, self.num_rows))

    def read(self, rows: range) -> torch.Tensor:
        """[len(rows), *row_shape]."""
        # torch's own memory is aligned; products of unaligned rows may differ in their last bits.
        result = torch.empty(len(rows), *self.row_shape, dtype=self.dtype)
        if rows:
            with open(self.path, "rb") as file:
                file.seek(rows.start * self.row_bytes)
                num_bytes = file.readinto(result.view(-1).view(torch.uint8).numpy().data)
            assert num_bytes == result.nbytes, f"{self.path} is too short"
        return result

    @contextmanager
    def writer(self) -> Iterator[RowWriter]:
        """Writes the file from its first row to its last, and to the disk."""
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            writer = RowWriter(self, fd)
            yield writer
            assert writer.written_bytes == self.num_bytes, f"{self.path} is not whole"
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(slots=True)
class RowWriter:
    file: RowFile  # what is being written
    fd: int  # descriptor of the open file
    written_bytes: int = 0  # so far

    def append(self, rows: torch.Tensor) -> None:
        """The next rows; they take the file's dtype."""
        assert rows.shape[1:] == self.file.row_shape, f"{rows.shape} in {self.file}"
        flat = rows.to("cpu", self.file.dtype).contiguous().reshape(-1).view(torch.uint8)
        data = flat.numpy().data
        while data:
            written = os.pwrite(self.fd, data, self.written_bytes)
            data, self.written_bytes = data[written:], self.written_bytes + written


NextStates = Callable[[int, tuple[int, ...], torch.dtype], RowFile]
"""Places the states after the next unit: (num_rows, row_shape, dtype) -> file."""
