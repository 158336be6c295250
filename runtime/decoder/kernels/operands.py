"""What travels together into the kernels of a decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TILE_QUERIES = 64


@dataclass(frozen=True, slots=True)
class Norm:
    weight: torch.Tensor  # [hidden_size] in `dtype`
    eps: float  # added to the mean square


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Where the rows of a step stand: one row a token."""

    cos: torch.Tensor  # [T, head_dim / 2] float32, `rope_tables` of the rows' positions
    sin: torch.Tensor  # as cos
    slots: torch.Tensor  # [T] int64, block * TOKENS_PER_BLOCK + place in the block


def tile_tokens(group: int) -> int:
    """Rows of a tile, each with the `group` query heads that share a KV head: 64 products of a
    query at most, padding among them."""
    return max(1, _TILE_QUERIES >> (group - 1).bit_length())


@dataclass(frozen=True, slots=True)
class ChunkTiles:
    """How chunks of prompts are divided among the programs of attention."""

    # [n, 4] int32: first row, rows (0: none), position of the first, and in `Contexts` the place of
    # its sequence's position 0.
    rows: torch.Tensor
    num_tokens: int  # the most rows of a tile, `tile_tokens`


@dataclass(frozen=True, slots=True)
class CacheScale:
    """The scale of a layer's keys, or of its values: real = stored * scale."""

    tensor: torch.Tensor  # float32 without dimensions, on their device
    value: float  # the same number, on the host


@dataclass(frozen=True, slots=True)
class KVPages:
    """A layer's part of the paged cache: e4m3 (on a CPU bfloat16 too) with scales, which may be one
    and the same; without them keys and values are in `dtype`."""

    k: torch.Tensor  # [num_blocks, kv_heads, TOKENS_PER_BLOCK, head_dim]
    v: torch.Tensor  # as k
    k_scale: CacheScale | None  # None: keys are in `dtype`
    v_scale: CacheScale | None  # None: values are in `dtype`

    @property
    def scale_tensors(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The scales of K and of V, without dimensions; None for a cache in `dtype`."""
        k, v = self.k_scale, self.v_scale
        return None if k is None else k.tensor, None if v is None else v.tensor

    @property
    def k_factor(self) -> float:
        """What stored keys are multiplied by."""
        return 1.0 if self.k_scale is None else self.k_scale.value

    @property
    def v_factor(self) -> float:
        """What stored values are multiplied by."""
        return 1.0 if self.v_scale is None else self.v_scale.value


@dataclass(frozen=True, slots=True)
class Contexts:
    """Which pages hold the contexts of a step's chunks, and memory to gather a layer's into.

    Contexts stand one after another, each from a multiple of `CONTEXT_STEP` positions on.
    """

    pages: torch.Tensor  # [n, 2] int32: a block of the cache, and how many of its positions count
    num_pages: torch.Tensor  # [1] int32: so many of them are filled
    k: torch.Tensor  # [kv_heads, positions, head_dim up to a power of 2], float16 or `dtype`
    v: torch.Tensor  # as k
