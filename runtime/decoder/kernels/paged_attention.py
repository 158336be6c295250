"""Triton: flash decoding over the paged FP8 cache, split along the context.

After Flash-Decoding (crfm.stanford.edu, 2023): a program takes one request, one KV head with all
its query heads, and one split of the positions; the split that ends last merges them all, always in
the same order, so the result does not depend on which that is. FlashAttention: arXiv 2205.14135.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nvlm.fp8 import E4M3
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.quantization import quantize

_MIN_ROWS = 16  # of a tensor-core product
TOKENS_PER_STEP = 128
_LOG2_E = 1.4426950408889634


@triton.jit
def _widened(values, ON_GPU: tl.constexpr):
    """e4m3 in float16, four at a time. As assembly because the compiler would otherwise have the
    tensor cores' layout first, and gather values out of shared memory byte by byte."""
    if not ON_GPU:
        return values.to(tl.float16)
    return tl.inline_asm_elementwise(
        """{ .reg .b16 low, high; mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }""",
        "=r,=r,r", [values], dtype=tl.float16, is_pure=False, pack=4,
    )  # fmt: skip


# The stride is that of a step's widest table: it must not decide what is compiled.
@triton.jit(do_not_specialize=["table_stride"])
def _paged_attention(
    q, k_cache, v_cache, block_tables, lengths, kv_scale, scale, out,
    partial_sums, partial_stats, counters, exponent_scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
    QUANTIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
    ON_GPU: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
    row_mask, channel_mask = row < GROUP, channel < HEAD_DIM
    q_mask = row_mask[:, None] & channel_mask[None, :]
    head = (request * KV_HEADS + kv_head) * GROUP + row
    offsets = head[:, None] * HEAD_DIM + channel[None, :]
    kv = tl.load(kv_scale)
    length = tl.load(lengths + request)
    if PDL:
        gdc_wait()
    loaded = tl.load(q + offsets, q_mask, other=0.0)
    # Hopper widens e4m3 to float16 in one instruction, to bfloat16 in three; both are exact. What
    # float16 loses of bfloat16's range, above 65504 and below 6e-8, no query needs.
    queries = loaded.to(tl.float16)
    exponent_scale *= kv
    num_steps = tl.cdiv(length, BLOCK_TOKENS)
    steps_per_split = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, num_steps)

    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    table = block_tables + request * table_stride
    token = tl.arange(0, BLOCK_TOKENS)
    place = (kv_head * TOKENS + token % TOKENS) * HEAD_DIM  # in a block
    for step in range(begin, end):
        position = step * BLOCK_TOKENS + token
        is_cached = position < length
        block = tl.load(table + position // TOKENS, is_cached, other=0).to(tl.int64)
        source = (block * (KV_HEADS * TOKENS * HEAD_DIM) + place)[:, None] + channel[None, :]
        # Keys of no position are in memory and count for nothing; values would, were they NaN.
        k = tl.load(k_cache + source, channel_mask[None, :], other=0.0)
        v = tl.load(v_cache + source, is_cached[:, None] & channel_mask[None, :], other=0.0)
        scores = tl.dot(queries, tl.trans(k.to(tl.float16))) * exponent_scale
        scores = tl.where(is_cached[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, 1)
        # Two halves keep 22 bits of each probability, 24 behind the point at least.
        high = weights.to(tl.float16)
        low = (weights - high.to(tl.float32)).to(tl.float16)
        wide = _widened(v, ON_GPU)
        acc = tl.dot(low, wide, tl.dot(high, wide, acc * decay[:, None]))
        largest = new_largest

    if NUM_SPLITS > 1:
        task = request * KV_HEADS + kv_head
        mine = task * NUM_SPLITS + split
        sums = partial_sums + row[:, None] * BLOCK_DIM + channel[None, :]
        stats = partial_stats + row
        area: tl.constexpr = BLOCK_ROWS * BLOCK_DIM
        tl.store(sums + mine * area, acc, q_mask)
        tl.store(stats + mine * 2 * BLOCK_ROWS, largest)
        tl.store(stats + mine * 2 * BLOCK_ROWS + BLOCK_ROWS, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + task, 1, sem="acq_rel") == NUM_SPLITS - 1:
            tl.store(counters + task, 0)  # ready for the next launch
            # Past the first level of cache: other multiprocessors wrote them. No load waits for
            # another one, and splits are added in their order.
            part = tl.arange(0, BLOCK_SPLITS)[:, None]
            places = stats[None, :] + (task * NUM_SPLITS + part) * 2 * BLOCK_ROWS
            in_use = (part < NUM_SPLITS) & row_mask[None, :]
            theirs = tl.load(places, in_use, float("-inf"), cache_modifier=".cg")
            their_totals = tl.load(places + BLOCK_ROWS, in_use, 0.0, cache_modifier=".cg")
            # Rows of no query are 0 and not -inf, whose difference would be NaN.
            largest = tl.where(row_mask, tl.max(theirs, 0), 0.0)
            total = tl.sum(their_totals * tl.exp2(theirs - largest[None, :]), 0)
            acc = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
            for i in tl.static_range(NUM_SPLITS):
                other = task * NUM_SPLITS + i
                factor = tl.exp2(
                    tl.load(
                        stats + other * 2 * BLOCK_ROWS, row_mask, float("-inf"),
                        cache_modifier=".cg",
                    )
                    - largest
                )  # fmt: skip
                sums_there = tl.load(sums + other * area, q_mask, 0.0, cache_modifier=".cg")
                acc += sums_there * factor[:, None]
            factors = kv / tl.where(row_mask, total, 1.0)
            _store(acc * factors[:, None], scale, out + offsets, q_mask, loaded.dtype, QUANTIZE)
    else:
        factors = kv / total
        _store(acc * factors[:, None], scale, out + offsets, q_mask, loaded.dtype, QUANTIZE)


@triton.jit
def _store(attended, scale, target, mask, dtype: tl.constexpr, QUANTIZE: tl.constexpr):
    attended = attended.to(dtype)
    if QUANTIZE:
        tl.store(target, quantize(attended.to(tl.float32), tl.load(scale)), mask)
    else:
        tl.store(target, attended, mask)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    kv_scale: torch.Tensor,
    scale: torch.Tensor | None,
    workspace: Workspace,
    tokens_per_step: int = TOKENS_PER_STEP,
    pdl: bool = False,
) -> torch.Tensor:
    batch_size, heads, head_dim = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    group = heads // kv_heads
    out = torch.empty(
        batch_size, heads * head_dim, dtype=q.dtype if scale is None else E4M3, device=q.device
    )
    splits = workspace.num_splits(batch_size * kv_heads)
    _paged_attention[(batch_size, kv_heads, splits)](
        q, k_cache, v_cache, block_tables, lengths, kv_scale, scale, out,
        workspace.partial_sums, workspace.stats, workspace.counters,
        _LOG2_E * head_dim**-0.5, block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, TOKENS=block_size,
        QUANTIZE=scale is not None, NUM_SPLITS=splits,
        BLOCK_ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)), BLOCK_TOKENS=tokens_per_step,
        BLOCK_SPLITS=triton.next_power_of_2(splits), ON_GPU=q.device.type == "cuda",
        PDL=pdl, num_warps=4, num_stages=3, launch_pdl=pdl,
    )  # fmt: skip
    return out
