"""Writes a safetensors file tensor by tensor, which the library cannot.

Format: https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from build.output.direct_file import DirectFile
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.model.dtypes import SAFETENSORS_NAMES

_READ_BYTES = 4 << 20


class SafetensorsWriter:
    """Writes a file whose tensors are known by name and shape beforehand, block by block.

    The whole file is allocated at once, so a full disk is found before any work is done. Given
    `finished` (names that an earlier run wrote and synced) the existing file is continued. Peak
    memory: the block being written, and `buffer` (`page_buffer`), which files written by one thread
    may share. `OSError` passes through for the caller to explain.

    Written in the given order, the file's SHA-256 costs no second reading. What comes out of order
    is read again, mostly from the disk, as soon as nothing before it is missing.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        finished: Set[str] | None = None,
        buffer: mmap.mmap | None = None,
    ) -> None:
        self.path = path
        self._tensors = _aligned(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, info in self._tensors.items():
            end = offset + info.num_bytes
            header[name] = {
                "dtype": SAFETENSORS_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.size_bytes = 8 + len(encoded) + offset
        # Where the next byte of each unfinished tensor goes, and where it ends.
        self._next: dict[str, int] = {}
        self._end: dict[str, int] = {}
        for name in self._tensors.keys() - (finished or set()):
            start, end = header[name]["data_offsets"]
            self._next[name], self._end[name] = (8 + len(encoded) + x for x in (start, end))
        self._missing = set(self._next)
        self._digest = hashlib.sha256()
        self._digested_bytes = 0
        self._hasher = ThreadPoolExecutor(1, "hash")
        flags = os.O_CREAT | os.O_EXCL if finished is None else 0
        self._file = DirectFile(path, flags, buffer)
        try:
            os.posix_fallocate(self._file.fd, 0, self.size_bytes)
            self._write_at(0, memoryview(struct.pack("<Q", len(encoded)) + encoded))
            self._digest_until(self._first_missing())
        except OSError:
            self._hasher.shutdown()
            self._file.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """A whole tensor."""
        assert tuple(tensor.shape) == self._tensors[name].shape, f"{name}: {tensor.shape}"
        self.append(name, tensor)

    def append(self, name: str, block: torch.Tensor) -> None:
        """The next rows of a tensor."""
        info, offset = self._tensors[name], self._next[name]
        assert block.dtype == info.dtype, f"{name}: {block.dtype} is not {info.dtype}"
        assert block.shape[1:] == info.shape[1:], f"{name}: {block.shape} in {info.shape}"
        assert offset + block.nbytes <= self._end[name], f"{name}: more than {info.shape}"
        flat = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._write_at(offset, flat.numpy().data)
        self._next[name] = offset + block.nbytes
        if self._next[name] == self._end[name]:
            self._missing.discard(name)
            self._digest_until(self._first_missing())

    def _first_missing(self) -> int:
        """Where the first byte that is not written yet goes."""
        return min((self._next[name] for name in self._missing), default=self.size_bytes)

    def _write_at(self, offset: int, data: memoryview) -> None:
        hashed: Future[None] | None = None
        if offset == self._digested_bytes:  # beside the disk: both release Python's lock
            hashed = self._hasher.submit(self._digest.update, data)
            self._digested_bytes += len(data)
        self._file.write_at(offset, data)
        if hashed is not None:
            hashed.result()

    def sync(self) -> None:
        """Waits until everything written is on the disk, and gives its page cache back."""
        self._file.sync()

    def sha256(self) -> str:
        """Hashes the whole file; reads again what was not written in order."""
        self._digest_until(self.size_bytes)
        return self._digest.hexdigest()

    def _digest_until(self, end: int) -> None:
        while self._digested_bytes < end:
            size = min(end - self._digested_bytes, _READ_BYTES)
            chunk = os.pread(self._file.fd, size, self._digested_bytes)
            assert chunk, f"{self.path} is shorter than {self.size_bytes} bytes"
            self._digest.update(chunk)
            self._digested_bytes += len(chunk)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert not self._missing, f"never written: {sorted(self._missing)[:5]}"
                os.fsync(self._file.fd)
        finally:
            self._hasher.shutdown()
            self._file.close()


def _aligned(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """As given where that aligns every tensor to its own type, else widest types first, as the
    library does."""
    offset = 0
    for info in tensors.values():
        if offset % info.dtype.itemsize:
            return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        offset += info.num_bytes
    return dict(tensors)
