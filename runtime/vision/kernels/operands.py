"""What travels together into the kernels of a vision layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ScaledDelta:
    """What a branch adds to the residual stream: delta * layer_scale."""

    delta: torch.Tensor  # [..., size], as the residual stream
    layer_scale: torch.Tensor  # [size]
