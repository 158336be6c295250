"""What travels together into the kernels of a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Norm:
    weight: torch.Tensor  # [hidden_size] in `dtype`
    eps: float


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Where the rows of a step stand: one row a token."""

    cos: torch.Tensor  # [T, head_dim / 2] float32, `rope_tables` of the rows' positions
    sin: torch.Tensor
    slots: torch.Tensor  # [T] int64, block * TOKENS_PER_BLOCK + place in the block


@dataclass(frozen=True, slots=True)
class KVPages:
    """A layer's part of the paged cache."""

    k: torch.Tensor  # [num_blocks, kv_heads, TOKENS_PER_BLOCK, head_dim] e4m3 (CPU: bfloat16 too)
    v: torch.Tensor
    scale: torch.Tensor  # of both: float32 without dimensions, on their device
    scale_value: float  # the same number, on the host
