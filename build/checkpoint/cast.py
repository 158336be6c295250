"""From the types a checkpoint is published in to the one it is converted to."""

from __future__ import annotations

import torch

from nvlm.errors import UserError


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` in `dtype`. Raises `UserError` naming it when a value is, or becomes, not finite."""
    result = tensor.to(dtype)
    if not torch.isfinite(torch.tensor(amax(result))):
        if torch.isfinite(tensor).all():
            wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
            raise UserError(f"{name} overflows {dtype}; use --dtype {wider}")
        raise UserError(f"{name} has NaN or infinite values; download the checkpoint again")
    return result


def amax(tensor: torch.Tensor) -> float:
    """Largest magnitude; NaN or infinite exactly when some value is."""
    low, high = torch.aminmax(tensor)  # one pass, no temporary; NaN propagates
    return float(torch.maximum(-low, high))
