"""Writes to the disk past the page cache, where the file system lets it.

The page cache would copy every page, and drop pages of others for it. For a stream that nobody
reads again soon this costs more processor time than the stream's own computation.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np

_PAGE_BYTES = mmap.PAGESIZE
_BUFFER_BYTES = 8 << 20
_MIN_BYTES = 64 << 10  # less than this goes through the page cache


def page_buffer() -> mmap.mmap:
    """8 MB that begin on a page. They take memory from the first direct write on."""
    return mmap.mmap(-1, _BUFFER_BYTES)


class DirectFile:
    """An existing file of full size, open for reading and writing.

    A direct write moves whole pages from memory that begins on a page, so data pass a buffer of
    8 MB. The ends of a block share their pages with its neighbours and go through the page cache;
    the kernel keeps both ways coherent. Peak memory: the buffer.
    """

    def __init__(self, path: Path, flags: int, buffer: mmap.mmap | None = None) -> None:
        """Opens `path` with `flags` beside O_RDWR. buffer: a `page_buffer` that it shares with
        files written by the same thread. Raises `OSError`."""
        self._buffer = page_buffer() if buffer is None else buffer
        self.fd = os.open(path, os.O_RDWR | flags, 0o644)
        try:
            self._direct_fd: int | None = os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError:  # some file systems, such as older tmpfs
            self._direct_fd = None

    def write_at(self, offset: int, data: memoryview) -> None:
        """data: bytes. Raises `OSError`, as on a full disk."""
        head = -offset % _PAGE_BYTES
        num_direct = (len(data) - head) // _PAGE_BYTES * _PAGE_BYTES
        if num_direct >= _MIN_BYTES:
            self._write_cached(offset, data[:head])
            data, offset = data[head:], offset + head
            num_written = self._write_direct(offset, data[:num_direct])
            data, offset = data[num_written:], offset + num_written
        self._write_cached(offset, data)

    def _write_cached(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self.fd, data[:_BUFFER_BYTES], offset)
            data, offset = data[written:], offset + written

    def _write_direct(self, offset: int, data: memoryview) -> int:
        """Returns how much of whole pages is written; less than all where direct writes are
        refused, or one ends early."""
        done = 0
        while done < len(data) and self._direct_fd is not None:
            chunk = data[done : done + len(self._buffer)]
            filled = np.frombuffer(self._buffer, np.uint8, len(chunk))
            np.copyto(filled, np.frombuffer(chunk, np.uint8))  # without Python's lock
            try:
                written = os.pwrite(self._direct_fd, filled.data, offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._close_direct()
                break
            done += written
            if written < len(chunk):
                break
        return done

    def sync(self) -> None:
        """Waits until everything written is on the disk, and gives its page cache back."""
        os.fdatasync(self.fd)
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        self._close_direct()
        os.close(self.fd)

    def _close_direct(self) -> None:
        if self._direct_fd is not None:
            os.close(self._direct_fd)
            self._direct_fd = None
