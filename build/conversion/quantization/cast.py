"""From the types a checkpoint is published in to the one it is converted to."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from nvlm.program.errors import UserError

BLOCK_BYTES = 16 << 20


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`. Raises `UserError` naming it when a value is, or becomes, not finite."""
    result, _ = _checked(name, tensor, dtype)
    return result


def _checked(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """As `cast`, with the largest magnitude, by which it is checked."""
    result = tensor.to(dtype)
    largest = amax(result)
    if not math.isfinite(largest):
        if torch.isfinite(tensor).all():
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
            raise UserError(f"{name} overflows {dtype}; use --dtype {wider}")
        raise UserError(f"{name} has NaN or infinite values; download the checkpoint again")
    return result, largest


def cast_amax(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> float:
    """Largest magnitude of `cast`, which is checked on the way; a block in memory at a time."""
    return max(_checked(name, block.to(device), dtype)[1] for block in row_blocks(tensor))


def row_blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of consecutive rows, `BLOCK_BYTES` or one row each."""
    yield from tensor.split(max(1, BLOCK_BYTES * len(tensor) // tensor.nbytes))


def amax(tensor: torch.Tensor) -> float:
    """Largest magnitude; NaN or infinite exactly when some value is."""
    low, high = torch.aminmax(tensor)  # one pass, no temporary; NaN propagates
    return float(torch.maximum(-low, high))
