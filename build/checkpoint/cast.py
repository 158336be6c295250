"""From the types a checkpoint is published in to the one it is converted to."""

from __future__ import annotations

import torch

from nvlm.errors import UserError


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`. Raises `UserError` naming it when a value is, or becomes, not finite."""
    result = tensor.to(dtype)
    # max(|x|) is NaN or infinite exactly when some value is, and needs no mask of the whole.
    if result.numel() and not torch.isfinite(torch.linalg.vector_norm(result, ord=torch.inf)):
        if torch.isfinite(tensor).all():
            raise UserError(f"{name} overflows {dtype}; use --dtype bfloat16 or float32")
        raise UserError(f"{name} has NaN or infinite values; download the checkpoint again")
    return result


def amax(tensor: torch.Tensor) -> float:
    """Largest magnitude, as float32."""
    return float(torch.linalg.vector_norm(tensor, ord=torch.inf, dtype=torch.float32))
