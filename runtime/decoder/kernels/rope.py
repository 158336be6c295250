"""Triton: QKV split, RoPE and append to the paged cache in one pass.

A program takes one token and as many heads as there are KV heads: a slice of q, or K, or V.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.decoder.kernels.operands import KVPages, TokenRows
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.quantization import quantize, scale_at


@triton.jit
def _rope_append(
    qkv, cos, sin, slots, k_cache, v_cache, k_scale, v_scale, q_out, kv_heads, group_size,
    HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = HEAD_DIM // 2
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    channel = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (head < kv_heads) & (channel < half)
    num_heads = (group_size + 2) * kv_heads
    source = qkv + (token * num_heads + part * kv_heads + head) * HEAD_DIM + channel
    scale = tl.where(part == group_size, scale_at(k_scale), scale_at(v_scale))
    wait_for_previous(ON_GPU)
    slot = tl.load(slots + token)
    first, second = tl.load(source, mask, other=0.0), tl.load(source + half, mask, other=0.0)
    if part <= group_size:  # q or K
        in_half = channel < half
        c = tl.load(cos + token * half + channel, in_half, other=0.0)
        s = tl.load(sin + token * half + channel, in_half, other=0.0)
        first32, second32 = first.to(tl.float32), second.to(tl.float32)
        dtype = first.dtype
        first = (first32 * c - second32 * s).to(dtype)
        second = (second32 * c + first32 * s).to(dtype)
    if part < group_size:
        target = q_out + ((token * group_size + part) * kv_heads + head) * HEAD_DIM + channel
        tl.store(target, first, mask)
        tl.store(target + half, second, mask)
    else:
        row = (slot // TOKENS * kv_heads + head) * TOKENS + slot % TOKENS
        is_fp8: tl.constexpr = k_scale is not None
        first_stored = quantize(first.to(tl.float32), scale) if is_fp8 else first
        second_stored = quantize(second.to(tl.float32), scale) if is_fp8 else second
        if part == group_size:
            tl.store(k_cache + row * HEAD_DIM + channel, first_stored, mask)
            tl.store(k_cache + row * HEAD_DIM + channel + half, second_stored, mask)
        else:
            tl.store(v_cache + row * HEAD_DIM + channel, first_stored, mask)
            tl.store(v_cache + row * HEAD_DIM + channel + half, second_stored, mask)


def rope_append(qkv: torch.Tensor, rows: TokenRows, pages: KVPages) -> torch.Tensor:
    _, kv_heads, block_size, head_dim = pages.k.shape
    num_tokens, heads = qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads
    q = torch.empty(num_tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    group_size = heads // kv_heads
    _rope_append[(num_tokens, group_size + 2)](
        qkv, rows.cos, rows.sin, rows.slots, pages.k, pages.v, *pages.scale_tensors, q,
        kv_heads, group_size,
        HEAD_DIM=head_dim, TOKENS=block_size, BLOCK_HEADS=triton.next_power_of_2(kv_heads),
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2), num_warps=4, **dependent(qkv.device),
    )  # fmt: skip
    return q
