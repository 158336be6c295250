"""The kernels in plain torch, by the numerics contract's words: oracle, and fallback on a CPU.

e4m3 rows are [num_tokens, ...]; a scale is a float32 tensor of one value, on the rows' device.
Cache: K and V each [num_blocks, kv_heads, TOKENS_PER_BLOCK, head_dim] e4m3 (CPU: bfloat16 too).
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model.decoder import apply_rope, causal_attention, rms_norm
from nvlm.model.number_formats import fp8


def add_rms_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + delta and its RMSNorm, e4m3 if a scale is given: two [T, hidden_size].

    delta: in hidden's type, or float32 sums of several ranks, which are rounded to it first.
    """
    if delta is not None:
        hidden = hidden + delta.to(hidden.dtype)
    normed = rms_norm(hidden, weight, eps)
    return hidden, normed if scale is None else fp8.quantize(normed, scale)


def gate_up_swiglu(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    product_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """silu(gate) * up in float32, rounded, then e4m3: [T, I]. weight: [2 I, hidden_size] e4m3, gate
    first; scale: of its sums, which are rounded to `dtype`."""
    gate, up = linear(x, weight, scale, None, dtype).to(torch.float32).chunk(2, dim=-1)
    return fp8.quantize((nn.functional.silu(gate) * up).to(dtype), product_scale)


def rope_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_scale: torch.Tensor,
) -> torch.Tensor:
    """Rotates q and k, writes K and V to the cache, returns q [T, heads, head_dim] in `dtype`.

    qkv: [T, (heads + 2 kv_heads) head_dim]; cos, sin: `rope_tables` of the rows' positions;
    slots: [T] int64, block * TOKENS_PER_BLOCK + place in the block.
    """
    kv_heads, block_size, head_dim = k_cache.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    blocks, places = slots // block_size, slots % block_size
    for cache, x in ((k_cache, apply_rope(k, cos, sin)), (v_cache, v)):
        cache[blocks, :, places] = fp8.quantize(x, kv_scale).to(cache.dtype)
    return apply_rope(q, cos, sin)


def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    positions: torch.Tensor,
    kv_scale: torch.Tensor,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """`rope_append`, then one query row a request over its positions up to the row's own:
    [T, heads * head_dim], e4m3 with `scale`.

    block_tables: [T, max_blocks] int32; positions: [T] int32.
    """
    q = rope_append(qkv, cos, sin, slots, k_cache, v_cache, kv_scale)
    rows = []
    for query, table, position in zip(q, block_tables, positions.tolist(), strict=True):
        k, v = (
            fp8.dequantize(
                cache[table.long()].transpose(1, 2).flatten(0, 1)[: position + 1], kv_scale
            )
            for cache in (k_cache, v_cache)
        )
        rows.append(causal_attention(query[None], k, v, position))
    attended = torch.cat(rows).flatten(1).to(q.dtype)
    return attended if scale is None else fp8.quantize(attended, scale)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    blocks: torch.Tensor,
    first_position: int,
    kv_scale: float,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Rows at first_position, ... of one sequence over its positions up to theirs:
    [T, heads * head_dim], e4m3 with `scale`.

    q: [T, heads, head_dim]; blocks: [num_blocks of the sequence] int64, in order.
    """
    end = first_position + len(q)
    k, v = (
        fp8.dequantize(cache[blocks].transpose(1, 2).flatten(0, 1)[:end], kv_scale)
        for cache in (k_cache, v_cache)
    )
    attended = causal_attention(q, k, v, first_position).flatten(1).to(q.dtype)
    return attended if scale is None else fp8.quantize(attended, scale)


def plan_prefill_attention(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, max_num_tokens: int
) -> None:
    """What prompts of up to `max_num_tokens` tokens need once is done now: here nothing."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x @ weight.T * scale + bias: float32 sums, one rounding. x: [T, K], weight: [N, K], e4m3."""
    y = nn.functional.linear(x.to(torch.float32), weight.to(torch.float32)) * scale
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


def head(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits x @ weight.T in float32. x: [T, hidden_size], weight: [vocab_size, hidden_size]."""
    return nn.functional.linear(x.to(torch.float32), weight.to(torch.float32))
