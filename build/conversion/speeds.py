"""How fast this machine reads, writes and multiplies, measured in a few seconds for --dry_run."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from build.conversion.plan import Speeds
from nvlm.formats import layout

_SAMPLE_BYTES = 64 << 20
_CHUNK_BYTES = 8 << 20


def measure_speeds(model_dir: Path, output_dir: Path, device: torch.device) -> Speeds | None:
    """Reads a part of the weights, writes a nameless file where the output is going to be.

    None where nothing can be written.
    """
    parent = next(path for path in output_dir.absolute().parents if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            write = _write_speed(file.fileno())
            weights = [*model_dir.glob(layout.ANY_WEIGHTS), *model_dir.rglob("*.pt")]
            largest = max(weights, key=lambda path: path.stat().st_size, default=None)
            if largest is None:
                return Speeds(_read_speed(file.fileno()), write, _flops(device))
            with open(largest, "rb") as source:
                return Speeds(_read_speed(source.fileno()), write, _flops(device))
    except OSError:
        return None


def _write_speed(fd: int) -> float:
    """Measures writes to the disk, not to the page cache."""
    data = memoryview(os.urandom(_CHUNK_BYTES))
    start = time.perf_counter()
    for _ in range(_SAMPLE_BYTES // _CHUNK_BYTES):
        os.write(fd, data)
    os.fsync(fd)
    return _SAMPLE_BYTES / (time.perf_counter() - start)


def _read_speed(fd: int) -> float:
    """Bytes a second of up to `_SAMPLE_BYTES`, which are dropped from the page cache before."""
    os.posix_fadvise(fd, 0, _SAMPLE_BYTES, os.POSIX_FADV_DONTNEED)
    size, offset = min(_SAMPLE_BYTES, os.fstat(fd).st_size), 0
    start = time.perf_counter()
    while offset < size:
        offset += len(os.pread(fd, _CHUNK_BYTES, offset))
    return offset / (time.perf_counter() - start)


def _flops(device: torch.device) -> float:
    """Operations a second of a float32 product; the first one warms up."""
    rows, width = 1024, 2048
    x, weight = torch.randn(rows, width, device=device), torch.randn(width, width, device=device)
    (x @ weight).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.3:
        (x @ weight).sum().item()
        count += 1
    return 2.0 * rows * width * width * count / (time.perf_counter() - start)
