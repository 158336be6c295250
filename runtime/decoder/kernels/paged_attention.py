"""Triton: flash decoding over the paged FP8 cache, split along the context.

After Flash-Decoding (crfm.stanford.edu, 2023): a program takes one request, one KV head with all
its query heads, and one split of the positions; the split that ends last merges them all, always in
the same order, so the result does not depend on which that is. FlashAttention: arXiv 2205.14135.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.fp8 import E4M3
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.quantization import quantize

_MIN_ROWS = 16  # of a tensor-core product
_TOKENS_PER_STEP = 64


@triton.jit
def _paged_attention(
    q, k_cache, v_cache, block_tables, lengths, kv_scale, scale, out,
    partial_sums, partial_stats, counters, softmax_scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
    QUANTIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
    row_mask, channel_mask = row < GROUP, channel < HEAD_DIM
    q_mask = row_mask[:, None] & channel_mask[None, :]
    head = (request * KV_HEADS + kv_head) * GROUP + row
    offsets = head[:, None] * HEAD_DIM + channel[None, :]
    queries = tl.load(q + offsets, q_mask, other=0.0)
    kv = tl.load(kv_scale)
    length = tl.load(lengths + request)
    num_steps = tl.cdiv(length, BLOCK_TOKENS)
    steps_per_split = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, num_steps)

    largest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
    for step in range(begin, end):
        position = step * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        is_cached = position < length
        block = tl.load(
            block_tables + request * table_stride + position // TOKENS, is_cached, other=0
        ).to(tl.int64)
        cache_row = ((block * KV_HEADS + kv_head) * TOKENS + position % TOKENS) * HEAD_DIM
        mask = is_cached[:, None] & channel_mask[None, :]
        k = tl.load(k_cache + cache_row[:, None] + channel[None, :], mask, other=0.0)
        v = tl.load(v_cache + cache_row[:, None] + channel[None, :], mask, other=0.0)
        # e4m3 numbers are bfloat16 and float16 ones, so widening is exact; the scale comes after.
        scores = tl.dot(queries, tl.trans(k.to(queries.dtype))) * (softmax_scale * kv)
        scores = tl.where(is_cached[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new_largest[:, None])
        decay = tl.exp(largest - new_largest)
        total = total * decay + tl.sum(weights, 1)
        # Two halves keep 16 bits of each probability in tensor-core products of 8-bit mantissas.
        high = weights.to(queries.dtype)
        low = (weights - high.to(tl.float32)).to(queries.dtype)
        wide = v.to(queries.dtype)
        acc = tl.dot(low, wide, tl.dot(high, wide, acc * decay[:, None]))
        largest = new_largest

    if NUM_SPLITS > 1:
        task = request * KV_HEADS + kv_head
        place = task * NUM_SPLITS + split
        sums = partial_sums + row[:, None] * BLOCK_DIM + channel[None, :]
        stats = partial_stats + row
        area: tl.constexpr = BLOCK_ROWS * BLOCK_DIM
        tl.store(sums + place * area, acc)
        tl.store(stats + place * 2 * BLOCK_ROWS, largest)
        tl.store(stats + place * 2 * BLOCK_ROWS + BLOCK_ROWS, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + task, 1, sem="acq_rel") == NUM_SPLITS - 1:
            tl.store(counters + task, 0)  # ready for the next launch
            # Row by row, so that nothing waits for what another split wrote more than once.
            part = tl.arange(0, BLOCK_SPLITS)
            part_mask = part < NUM_SPLITS
            rows = (task * NUM_SPLITS + part) * BLOCK_ROWS
            for i in tl.static_range(GROUP):
                # Past the first level of cache: other multiprocessors wrote them.
                theirs = tl.load(
                    partial_stats + 2 * rows + i, part_mask, float("-inf"), cache_modifier=".cg"
                )
                their_totals = tl.load(
                    partial_stats + 2 * rows + BLOCK_ROWS + i, part_mask, 0.0, cache_modifier=".cg"
                )
                their_sums = tl.load(
                    partial_sums + (rows + i)[:, None] * BLOCK_DIM + channel[None, :],
                    part_mask[:, None], 0.0, cache_modifier=".cg",
                )  # fmt: skip
                factors = tl.exp(theirs - tl.max(theirs))
                row_sums = tl.sum(their_sums * factors[:, None], 0) * kv
                row_total = tl.broadcast_to(tl.sum(their_totals * factors), row_sums.shape)
                target = (request * KV_HEADS + kv_head) * GROUP + i
                _store(
                    row_sums, row_total, scale, out + target * HEAD_DIM + channel, channel_mask,
                    queries.dtype, QUANTIZE,
                )  # fmt: skip
    else:
        totals = tl.broadcast_to(total[:, None], acc.shape)
        _store(acc * kv, totals, scale, out + offsets, q_mask, queries.dtype, QUANTIZE)


@triton.jit
def _store(sums, total, scale, target, mask, dtype: tl.constexpr, QUANTIZE: tl.constexpr):
    attended = tl.div_rn(sums, total).to(dtype)
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
        head_dim**-0.5, block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, TOKENS=block_size,
        QUANTIZE=scale is not None, NUM_SPLITS=splits,
        BLOCK_ROWS=max(_MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)), BLOCK_TOKENS=_TOKENS_PER_STEP,
        BLOCK_SPLITS=triton.next_power_of_2(splits),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
