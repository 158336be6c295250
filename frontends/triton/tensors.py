"""The tensors of one request as Python values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from nvlm.program.errors import UserError

Tensors = Mapping[str, NDArray[Any]]
"""By name, with the batch dimension, which is 1; strings are arrays of bytes."""


def scalar(tensors: Tensors, name: str, default: Any) -> Any:
    if name not in tensors:
        return default
    values = tensors[name].reshape(-1).tolist()
    if len(values) != 1:
        raise UserError(f"{name} has {len(values)} values, expected 1")
    return values[0]


def strings(tensors: Tensors, name: str) -> list[bytes]:
    return tensors[name].reshape(-1).tolist() if name in tensors else []


def text(tensors: Tensors, name: str, default: str) -> str:
    value = scalar(tensors, name, None)
    return default if value is None else decode(value, name)


def decode(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
