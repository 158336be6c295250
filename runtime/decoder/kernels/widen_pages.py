"""Triton: a sequence's keys and values, gathered from the paged cache and widened."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.decoder.kernels.operands import KVPages


@triton.jit(do_not_specialize=["length", "num_positions"])
def _widen_pages(
    k_cache, v_cache, blocks, k_out, v_out, length, num_positions, KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    page, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # part 0: keys
    token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    position = page * TOKENS + token
    in_head = channel < HEAD_DIM
    is_cached = position < length
    block = tl.load(blocks + page, page * TOKENS < length, other=0)
    source = ((block * KV_HEADS + head) * TOKENS + token) * HEAD_DIM + channel
    target = (head.to(tl.int64) * num_positions + position) * HEAD_DIM + channel
    if part == 0:
        keys = tl.load(k_cache + source, is_cached & in_head, other=0.0)
        tl.store(k_out + target, keys.to(k_out.dtype.element_ty), in_head)
    else:
        values = tl.load(v_cache + source, is_cached & in_head, other=0.0)
        tl.store(v_out + target, values.to(v_out.dtype.element_ty), in_head)


def widen_pages(
    pages: KVPages,
    blocks: torch.Tensor,
    length: int,
    num_positions: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [kv_heads, num_positions, head_dim] of the positions below `length` that lie on
    `blocks` [num_blocks] int64, without their scales; 0 from there on. num_positions: a multiple of
    a block's, no less than `length`."""
    _, kv_heads, block_size, head_dim = pages.k.shape
    k, v = (
        torch.empty(kv_heads, num_positions, head_dim, dtype=dtype, device=pages.k.device)
        for _ in range(2)
    )
    _widen_pages[(num_positions // block_size, kv_heads, 2)](
        pages.k, pages.v, blocks, k, v, length, num_positions, KV_HEADS=kv_heads,
        TOKENS=block_size, HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim),
        num_warps=4,
    )  # fmt: skip
    return k, v
