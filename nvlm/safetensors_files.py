"""Safetensors files: memory-mapped reading with one-line errors, streaming writing.

The library reads; it cannot write a file tensor by tensor, so that part is here. Format:
https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nvlm.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from nvlm.errors import UserError

_MAX_WRITE_BYTES = 1 << 30  # one write() moves at most 2 GiB on Linux


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """One file, memory-mapped: tensors are views of the mapping until something copies them.

    Raises `UserError` when the file is missing, cut short or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt", device="cpu")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({error}); download or copy it again"
            ) from None
        self.tensors: dict[str, TensorInfo] = {}
        for name in self._file.keys():  # noqa: SIM118 - safe_open is no mapping
            part = self._file.get_slice(name)
            dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
            if dtype is None:
                supported = ", ".join(SAFETENSORS_DTYPES)
                raise UserError(
                    f"{path}: {name} is stored as {part.get_dtype()}, expected one of {supported}"
                )
            self.tensors[name] = TensorInfo(dtype, tuple(part.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor


class SafetensorsWriter:
    """Writes a file whose tensors are known by name and shape beforehand, in any order.

    The whole file is allocated at once, so a full disk is found before any work is done. Peak
    memory: the tensor being written. `OSError` passes through for the caller to explain.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        # Widest types first, as the library does: every tensor is aligned to its own type.
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        self._tensors = dict(tensors)
        self._missing = set(tensors)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._offsets: dict[str, int] = {}
        for name, info in tensors.items():
            end = offset + info.num_bytes
            header[name] = {
                "dtype": SAFETENSORS_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            self._offsets[name], offset = offset, end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data_start = 8 + len(encoded)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(self._fd, 0, self._data_start + offset)
            self._write_at(0, memoryview(struct.pack("<Q", len(encoded)) + encoded))
        except OSError:
            os.close(self._fd)
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        info = self._tensors[name]
        assert tensor.dtype == info.dtype, f"{name}: {tensor.dtype} is not {info.dtype}"
        assert tuple(tensor.shape) == info.shape, f"{name}: {tensor.shape} is not {info.shape}"
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._write_at(self._data_start + self._offsets[name], flat.numpy().data)
        self._missing.remove(name)

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._fd, data[:_MAX_WRITE_BYTES], offset)
            data, offset = data[written:], offset + written

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
                os.fsync(self._fd)
        finally:
            os.close(self._fd)
