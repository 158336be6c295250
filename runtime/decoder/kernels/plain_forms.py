"""The steps of a decoder layer in plain torch, by the numerics contract's words."""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model.decoder import apply_rope, causal_attention, rms_norm
from nvlm.model.number_formats import fp8
from runtime.decoder.kernels.operands import (
    CacheScale,
    ChunkTiles,
    Contexts,
    KVPages,
    Norm,
    TokenRows,
)
from runtime.kernels.fp8_linear import Fp8Linear


class PlainForms:
    """What each step computes, on any device. Kernels override it; this is their oracle.

    Rows are [num_tokens, ...]. `scale` is a float32 tensor of one value on the rows' device; what
    is given one comes as e4m3.
    """

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        norm: Norm,
        scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + delta and its RMSNorm, e4m3 if a scale is given: two [T, hidden_size].

        delta: in hidden's type, or float32 sums of several ranks, which are rounded to it first.
        """
        if delta is not None:
            hidden = hidden + delta.to(hidden.dtype)
        normed = rms_norm(hidden, norm.weight, norm.eps)
        return hidden, normed if scale is None else fp8.quantize(normed, scale)

    def linear(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x @ weight.T * scale + bias: float32 sums, one rounding. x: [T, in_features] e4m3.

        out: where the result must be, [T, out_features] of `dtype`.
        """
        y = fp8.product(x, linear.weight, linear.scale, linear.bias).to(dtype)
        return y if out is None else out.copy_(y)

    def gate_up_swiglu(
        self,
        x: torch.Tensor,
        gate_up: Fp8Linear,
        down: Fp8Linear,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """silu(gate) * up in float32, rounded, then e4m3, the input of `down`: [T, I].

        gate_up: weight [2 I, hidden_size], gate first, no bias; its sums are rounded to `dtype`.
        """
        gate, up = self.linear(x, gate_up, dtype).to(torch.float32).chunk(2, dim=-1)
        return fp8.quantize((nn.functional.silu(gate) * up).to(dtype), down.activation_scale)

    def rope_append(self, qkv: torch.Tensor, rows: TokenRows, pages: KVPages) -> torch.Tensor:
        """Rotates q and k, writes K and V to the cache, returns q [T, heads, head_dim] in `dtype`.

        qkv: [T, (heads + 2 kv_heads) head_dim].
        """
        kv_heads, block_size, head_dim = pages.k.shape[1:]
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
        blocks, places = rows.slots // block_size, rows.slots % block_size
        turned = apply_rope(k, rows.cos, rows.sin)
        for cache, x, scale in ((pages.k, turned, pages.k_scale), (pages.v, v, pages.v_scale)):
            cache[blocks, :, places] = _stored(x, scale).to(cache.dtype)
        return apply_rope(q, rows.cos, rows.sin)

    def decode_attention(
        self,
        qkv: torch.Tensor,
        rows: TokenRows,
        block_tables: torch.Tensor,
        positions: torch.Tensor,
        pages: KVPages,
        scale: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`rope_append`, then one query row a request over its positions up to the row's own:
        [T, heads * head_dim], e4m3 with `scale`, in `out` if it is given.

        block_tables: [T, max_blocks] int32; positions: [T] int32.
        """
        q = self.rope_append(qkv, rows, pages)
        attended = []
        for query, table, position in zip(q, block_tables, positions.tolist(), strict=True):
            k, v = _sequence(pages, table.long(), position + 1)
            attended.append(causal_attention(query[None], k, v, position))
        values = torch.cat(attended).flatten(1).to(q.dtype)
        return _placed(values if scale is None else fp8.quantize(values, scale), out)

    def chunk_attention(
        self,
        q: torch.Tensor,
        tiles: ChunkTiles,
        contexts: Contexts,
        pages: KVPages,
        scale: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Rows of several sequences, each over its sequence's positions up to its own; rows of no
        tile stay as they are. Writes `out` [T, heads * head_dim], e4m3 with `scale`.

        q: [T, heads, head_dim]. Kernels use the memory of `contexts`.
        """
        block_size = pages.k.shape[2]
        for first_row, num_rows, first_position, place in tiles.rows.tolist():
            if num_rows > 0:
                length, rows = first_position + num_rows, slice(first_row, first_row + num_rows)
                first_page = place // block_size
                blocks = contexts.pages[first_page : first_page - (-length // block_size), 0]
                k, v = _sequence(pages, blocks.long(), length)
                attended = causal_attention(q[rows], k, v, first_position).flatten(1).to(q.dtype)
                values = attended if scale is None else fp8.quantize(attended, scale)
                _placed(values, out[rows])

    def load_ahead(self, weight: torch.Tensor) -> None:
        """The kernel that comes next leaves the memory idle: the beginning of a weight, [rows,
        columns] of one-byte numbers, may come into a cache meanwhile. Here nothing."""

    def join_ahead(self) -> None:
        """Call this after the last `load_ahead` of a step."""

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Float32 logits of x [T, hidden_size] and the head [vocab_size, hidden_size]."""
        return nn.functional.linear(x.to(torch.float32), weight.to(torch.float32))


def _sequence(
    pages: KVPages, blocks: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence's first `length` positions: float32 [length, kv_heads, head_dim]."""
    k, v = (
        cache[blocks].transpose(1, 2).flatten(0, 1)[:length].to(torch.float32) * factor
        for cache, factor in ((pages.k, pages.k_factor), (pages.v, pages.v_factor))
    )
    return k, v


def _placed(found: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return found
    out.view(torch.uint8).copy_(found.view(torch.uint8))
    return out


def _stored(x: torch.Tensor, scale: CacheScale | None) -> torch.Tensor:
    """x as the cache holds it."""
    return x if scale is None else fp8.quantize(x, scale.tensor)
