"""Reading ahead reads every byte once, and no longer than it is wanted."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from runtime.decoder.models import read_ahead


def test_every_byte_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_001))
    ranges: list[tuple[int, int]] = []
    finished = threading.Event()

    def preadv(fd: int, buffers: list[bytearray], offset: int) -> int:
        count = len(os.pread(fd, len(buffers[0]), offset))
        ranges.append((offset, offset + count))
        if len(ranges) == 25:
            finished.set()
        return count

    monkeypatch.setattr(read_ahead, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(os, "preadv", preadv)
    with read_ahead.reading_ahead(path):
        assert finished.wait(10)
    assert sorted(ranges) == [(i, min(i + 4096, 100_001)) for i in range(0, 100_001, 4096)]


def test_an_error_inside_ends_the_threads(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="inside"), read_ahead.reading_ahead(path):
        raise RuntimeError("inside")
    assert threading.active_count() == before
