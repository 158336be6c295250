"""Brings a file into the page cache ahead of whoever maps it: faults of a mapping read one piece at
a time, several readers keep a disk busy."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK_BYTES = 8 << 20
_NUM_THREADS = 4


@contextmanager
def reading_ahead(path: Path) -> Iterator[None]:
    """Inside, threads read `path` from its beginning; they end with it. Memory: a chunk each."""
    fd = os.open(path, os.O_RDONLY)
    offsets = iter(range(0, os.fstat(fd).st_size, _CHUNK_BYTES))
    lock, is_over = threading.Lock(), threading.Event()

    def read() -> None:
        chunk = bytearray(_CHUNK_BYTES)
        while not is_over.is_set():
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            os.preadv(fd, [chunk], offset)

    threads = [threading.Thread(target=read) for _ in range(_NUM_THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
        os.close(fd)
