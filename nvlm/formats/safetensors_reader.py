"""Reads safetensors files, memory-mapped and with one-line errors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from nvlm.model.dtypes import SAFETENSORS_DTYPES
from nvlm.program.errors import UserError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: torch.dtype  # as stored
    shape: tuple[int, ...]  # as stored

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.num_bytes for info in infos)


class TensorSource(Protocol):
    """Where a loader gets tensors by name: a file, or what stands in for one."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on any device."""
        ...


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

    def begins(self) -> dict[str, int]:
        """Where each tensor's bytes begin in the file, after 8 bytes and a header of so many."""
        with open(self.path, "rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(num_bytes))
        return {name: 8 + num_bytes + header[name]["data_offsets"][0] for name in self.tensors}
