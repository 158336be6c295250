"""Brings a mapped file's pages in, and gives back those that were not there before.

A conversion reads every weight once. Kept in the page cache, they drop other programs' files from
it. They also take memory that nobody has used for long: the host of a virtual machine has to find
such memory again, which takes up to ten times as long as the reading (docs/log.md). Pages that were
in the cache before stay there.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_PIECE_BYTES = 8 << 20
_AHEAD_BYTES = 64 << 20  # more than the kernel reads ahead of the page that is touched
_PAGEOUT = 21  # MADV_PAGEOUT, Linux 5.4

Range = tuple[int, int]
"""An address of this process, and how many bytes from there: whole pages."""

Bools = npt.NDArray[np.bool_]

_libc = ctypes.CDLL(None)


class BroughtPages:
    """Tells whose pages are whose while tensors are read, most of them in a file's order."""

    def __init__(self) -> None:
        # Beyond the last tensor, before it was touched: the first page, and which were missing.
        self._ahead = 0, np.zeros(0, bool)

    def bring_in(self, tensor: torch.Tensor) -> list[Range]:
        """Touches every page of the memory of `tensor`, so that a mapped file is read here and not
        where it is needed. Returns the whole pages that were not there."""
        if tensor.nbytes <= mmap.PAGESIZE or not tensor.is_contiguous():
            return []
        data = tensor.view(-1).view(torch.uint8)
        first = -(-data.data_ptr() // mmap.PAGESIZE)
        count = (data.data_ptr() + data.nbytes) // mmap.PAGESIZE - first
        missing = _missing(first, count)
        ahead_first, ahead = self._ahead
        end = first + count
        self._ahead = end, _missing(end, _AHEAD_BYTES // mmap.PAGESIZE)
        begin = first - ahead_first
        if 0 <= begin < len(ahead):  # the kernel read on after the tensor before
            known = ahead[begin : begin + count]
            missing[: len(known)] |= known
        for piece in data.split(_PIECE_BYTES):
            piece.numpy()[:: mmap.PAGESIZE].max()
        return _ranges(first, missing)


def give_back(ranges: Sequence[Range]) -> None:
    """Whoever reads them again reads the file again. The kernel changes no byte: pages that are no
    file's, or that others have mapped, stay, and so do all where it refuses."""
    for address, num_bytes in ranges:
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _PAGEOUT)


def _missing(first: int, count: int) -> Bools:
    """Which of `count` pages are not resident, as far as memory is mapped: mincore(2)."""
    states = np.zeros(count, np.uint8)
    step = _PIECE_BYTES // mmap.PAGESIZE
    for done in range(0, count, step):
        part = states[done : done + step]
        place = ctypes.c_void_p((first + done) * mmap.PAGESIZE)
        length = ctypes.c_size_t(len(part) * mmap.PAGESIZE)
        if _libc.mincore(place, length, ctypes.c_void_p(part.ctypes.data)) != 0:
            return states[:done] & 1 == 0
    return states & 1 == 0


def _ranges(first: int, is_wanted: Bools) -> list[Range]:
    edges = np.flatnonzero(np.diff(is_wanted, prepend=False, append=False)).reshape(-1, 2)
    return [
        ((first + int(begin)) * mmap.PAGESIZE, int(end - begin) * mmap.PAGESIZE)
        for begin, end in edges
    ]
