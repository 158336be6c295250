"""Rows after a tensor's own in memory, which a library's kernel may compute along and nobody
reads: cuBLASLt's products of fewer than 8 rows are slower than those of 8."""

from __future__ import annotations

import torch

SPARE_ROWS = 7


def empty_with_spare_rows(
    num_rows: int, *shape: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[num_rows, *shape], with `SPARE_ROWS` after it."""
    return torch.empty(num_rows + SPARE_ROWS, *shape, dtype=dtype, device=device)[:num_rows]


def with_spare_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """x [T, ...], contiguous, and the rows after it: [num_rows, ...]. A copy where memory ends."""
    assert x.is_contiguous()
    end = x.storage_offset() + num_rows * (x.numel() // len(x))
    if end > x.untyped_storage().nbytes() // x.itemsize:
        longer = x.new_empty(num_rows, *x.shape[1:])
        longer[: len(x)].copy_(x)
        return longer
    return x.as_strided((num_rows, *x.shape[1:]), x.stride())
