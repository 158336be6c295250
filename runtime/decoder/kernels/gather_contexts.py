"""Triton: the contexts of a step's chunks, gathered from the paged cache, e4m3 in float16.

Attention reads a context once for each tile of rows. It reads it in the form that tensor cores
take, by Hopper's copies of whole blocks (TMA), which take neither pages nor e4m3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.decoder.kernels.decode_attention import widened
from runtime.decoder.kernels.operands import Contexts, KVPages
from runtime.kernels.dependent_launch import dependent, wait_for_previous

_PROGRAMS = 1024  # about eight on a multiprocessor: memory wants many loads in flight


@triton.jit
def _gather_contexts(
    k_cache, v_cache, context_pages, num_pages, k_out, v_out, num_positions,
    KV_HEADS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    IS_FP8: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_DIM)[None, :]
    wait_for_previous(ON_GPU)
    num_tasks = tl.load(num_pages) * KV_HEADS
    for task in range(tl.program_id(0), num_tasks, tl.num_programs(0)):
        page, head = task // KV_HEADS, task % KV_HEADS
        block = tl.load(context_pages + 2 * page).to(tl.int64)
        is_cached = token < tl.load(context_pages + 2 * page + 1)
        source = ((block * KV_HEADS + head) * TOKENS + token) * HEAD_DIM + channel
        mask = is_cached & (channel < HEAD_DIM)
        keys = tl.load(k_cache + source, mask, other=0.0)
        values = tl.load(v_cache + source, mask, other=0.0)
        if IS_FP8:
            keys, values = widened(keys, ON_GPU), widened(values, ON_GPU)
        row = head * num_positions + page * TOKENS + token
        tl.store(k_out + row * BLOCK_DIM + channel, keys)
        tl.store(v_out + row * BLOCK_DIM + channel, values)


def gather_contexts(pages: KVPages, contexts: Contexts) -> None:
    """Fills `contexts.k` and `contexts.v`: stored numbers without their scales, and zeros where a
    page holds no position that counts, and after a head's channels."""
    _, kv_heads, block_size, head_dim = pages.k.shape
    _, num_positions, block_dim = contexts.k.shape
    num_programs = min(_PROGRAMS, len(contexts.pages) * kv_heads)
    _gather_contexts[(num_programs,)](
        pages.k, pages.v, contexts.pages, contexts.num_pages, contexts.k, contexts.v,
        num_positions, KV_HEADS=kv_heads, TOKENS=block_size, HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim, IS_FP8=pages.k_scale is not None, num_warps=4,
        **dependent(contexts.k.device),
    )  # fmt: skip
