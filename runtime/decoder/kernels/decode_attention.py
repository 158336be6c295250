"""Triton: RoPE, append to the paged cache, and flash decoding over it, split along the context.

After Flash-Decoding (crfm.stanford.edu, 2023): a program takes one request, one KV head with all
its query heads, and one split of the positions before the newest. The first split begins with the
newest position itself, whose key and value it rounds, appends and uses. The split that ends last
merges them all, always in the same order, so the result does not depend on which that is.
Products have positions or channels as rows and the group's queries as columns: tensor cores take 16
rows at least, but 8 columns, so that nothing is computed for queries that are not there.
FlashAttention: arXiv 2205.14135.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from nvlm.model.number_formats.fp8 import E4M3
from runtime.decoder.kernels.operands import KVPages, TokenRows
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.quantization import quantize, quantized, scale_at
from runtime.kernels.spare_rows import empty_with_spare_rows

_MIN_COLUMNS = 8  # least columns of a tensor-core product
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Step:
    """How a program of the attention kernel reads the cache.

    `python -m bench.hopper.attention` compares them.
    """

    num_tokens: int  # positions that it reads at once
    num_warps: int  # Triton's
    num_stages: int  # Triton's: loads in flight
    crowd: int  # programs of attention in the place of one of `Workspace.num_programs`, at most 4
    max_splits: int = 16  # pieces of a context, which one program merges


def step_for(batch_size: int, cache: torch.dtype = E4M3) -> Step:
    """Few requests are a matter of latency, many of bytes in flight (measured on both GPUs). Keys
    and values of two bytes take as many bytes."""
    step = Step(128, 4, 3, 1) if batch_size <= 8 else Step(32, 1, 3, 4)
    if cache.itemsize == 1:
        return step
    return replace(step, num_tokens=64) if batch_size <= 8 else replace(step, num_stages=2)


@triton.jit
def widened(values, ON_GPU: tl.constexpr):
    """e4m3 in float16, four at a time. As assembly because the compiler would otherwise have the
    tensor cores' layout first, and gather values out of shared memory byte by byte."""
    if not ON_GPU:
        return values.to(tl.float16)
    return tl.inline_asm_elementwise(
        """{ .reg .b16 low, high; mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }""",
        "=r,=r,r", [values], dtype=tl.float16, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def _blocks(table, step, token, num_before, TOKENS: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The block of each position of a step, as a column; one number where all are in one block."""
    if NUM_BLOCKS == 1:
        block = tl.load(table + step)
    else:
        position = step * (NUM_BLOCKS * TOKENS) + token
        block = tl.load(table + position // TOKENS, position < num_before, other=0)[:, None]
    return block.to(tl.int64)


# The stride is that of a step's widest table: it must not decide what is compiled.
@triton.jit(do_not_specialize=["table_stride"])
def _decode_attention(
    qkv, cos, sin, slots, k_cache, v_cache, block_tables, positions, k_scale, v_scale, scale,
    out, partial_sums, partial_stats, counters, exponent_scale, table_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS: tl.constexpr,
    QUANTIZE: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    request, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, channel = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_DIM)
    row_mask, channel_mask = row < GROUP, channel < HEAD_DIM
    q_mask = row_mask[:, None] & channel_mask[None, :]
    head = kv_head * GROUP + row
    k_unit, v_unit = scale_at(k_scale), scale_at(v_scale)
    wait_for_previous(ON_GPU)
    num_before = tl.load(positions + request)
    half: tl.constexpr = HEAD_DIM // 2
    is_first_half = channel < half
    # A rotated half is x cos -+ (the other half) sin.
    other = tl.where(is_first_half, channel + half, channel - half)
    angle = request * half + tl.where(is_first_half, channel, channel - half)
    c = tl.load(cos + angle, channel_mask, other=0.0)
    s = tl.load(sin + angle, channel_mask, other=0.0)
    s = tl.where(is_first_half, -s, s)
    source = qkv + request.to(tl.int64) * ((GROUP + 2) * KV_HEADS * HEAD_DIM)
    heads = source + head[:, None] * HEAD_DIM
    plain = tl.load(heads + channel[None, :], q_mask, other=0.0)
    turned = tl.load(heads + other[None, :], q_mask, other=0.0).to(tl.float32)
    rotated = (plain.to(tl.float32) * c[None, :] + turned * s[None, :]).to(plain.dtype)
    # Hopper widens e4m3 to float16 in one instruction, to bfloat16 in three; both are exact. What
    # float16 loses of bfloat16's range, above 65504 and below 6e-8, no query needs. Keys of a wider
    # type are multiplied in it.
    is_fp8: tl.constexpr = k_scale is not None
    wide: tl.constexpr = tl.float16 if is_fp8 else k_cache.dtype.element_ty
    queries = rotated.to(wide)
    exponent_scale *= k_unit

    # The newest position: appended, and where the first split begins.
    key_head = source + (GROUP * KV_HEADS + kv_head) * HEAD_DIM
    key = tl.load(key_head + channel, channel_mask, other=0.0)
    turned_key = tl.load(key_head + other, channel_mask, other=0.0).to(tl.float32)
    key = (key.to(tl.float32) * c + turned_key * s).to(key.dtype)
    value = tl.load(key_head + KV_HEADS * HEAD_DIM + channel, channel_mask, other=0.0)
    new_k, new_v = key, value
    exact_k, exact_v = key.to(tl.float32), value.to(tl.float32)
    if is_fp8:
        new_k, new_v = quantize(exact_k, k_unit), quantize(exact_v, v_unit)
        exact_k, exact_v = quantized(exact_k, k_unit, ON_GPU), quantized(exact_v, v_unit, ON_GPU)
    is_first = split == 0
    slot = tl.load(slots + request)
    place = ((slot // TOKENS * KV_HEADS + kv_head) * TOKENS + slot % TOKENS) * HEAD_DIM + channel
    tl.store(k_cache + place, new_k, channel_mask & is_first)
    tl.store(v_cache + place, new_v, channel_mask & is_first)
    score = tl.sum(queries.to(tl.float32) * exact_k[None, :], 1) * exponent_scale
    largest = tl.where(is_first, score, float("-inf"))
    total = tl.where(is_first, 1.0, tl.zeros((BLOCK_ROWS,), tl.float32))
    acc = tl.zeros((BLOCK_DIM, BLOCK_ROWS), tl.float32)
    acc = tl.where(is_first, acc + exact_v[:, None], acc)

    turned_queries = tl.trans(queries)
    num_steps = tl.cdiv(num_before, BLOCK_TOKENS)
    steps_per_split = tl.cdiv(num_steps, NUM_SPLITS)
    begin = split * steps_per_split
    end = tl.minimum(begin + steps_per_split, num_steps)
    table = block_tables + request * table_stride
    token = tl.arange(0, BLOCK_TOKENS)
    inside = ((kv_head * TOKENS + token % TOKENS) * HEAD_DIM)[:, None] + channel[None, :]
    blocks_per_step: tl.constexpr = BLOCK_TOKENS // TOKENS
    # The table is read a step ahead, so that keys and values wait for their address only once.
    first_step = tl.maximum(tl.minimum(begin, num_steps - 1), 0)  # the table has no entries beyond
    block = _blocks(table, first_step, token, num_before, TOKENS, blocks_per_step)
    for step in range(begin, end):
        next_step = tl.minimum(step + 1, end - 1)
        next_block = _blocks(table, next_step, token, num_before, TOKENS, blocks_per_step)
        is_cached = step * BLOCK_TOKENS + token < num_before
        cached = block * (KV_HEADS * TOKENS * HEAD_DIM) + inside
        # Keys of no position are in memory and count for nothing; values would, were they NaN.
        k = tl.load(k_cache + cached, channel_mask[None, :], other=0.0)
        v = tl.load(v_cache + cached, is_cached[:, None] & channel_mask[None, :], other=0.0)
        scores = tl.dot(k.to(wide), turned_queries) * exponent_scale
        scores = tl.where(is_cached[:, None], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 0))
        weights = tl.exp2(scores - new_largest[None, :])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(weights, 0)
        # Two halves keep 22 bits of each probability, 24 after the point at least; in bfloat16
        # they keep 16, of which the result's rounding keeps 8.
        high = weights.to(wide)
        low = (weights - high.to(tl.float32)).to(wide)
        if is_fp8:
            v = widened(v, ON_GPU)
        v = tl.trans(v)
        acc = tl.dot(v, low, tl.dot(v, high, acc * decay[None, :]))
        largest, block = new_largest, next_block

    rows = request * KV_HEADS * GROUP + head  # of the result
    if NUM_SPLITS > 1:
        task = request * KV_HEADS + kv_head
        mine = task * NUM_SPLITS + split
        sums = partial_sums + row[None, :] * BLOCK_DIM + channel[:, None]
        stats = partial_stats + row
        area: tl.constexpr = BLOCK_ROWS * BLOCK_DIM
        tl.store(sums + mine * area, acc)
        tl.store(stats + mine * 2 * BLOCK_ROWS, largest)
        tl.store(stats + mine * 2 * BLOCK_ROWS + BLOCK_ROWS, total)
        tl.debug_barrier()
        if tl.atomic_add(counters + task, 1, sem="acq_rel") == NUM_SPLITS - 1:
            tl.store(counters + task, 0)  # ready for the next launch
            # Past the first level of cache: other multiprocessors wrote them. Loads wait for no
            # other ones, and splits are added in their order. The first has seen a position.
            peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
            sum_of_weights = tl.zeros((BLOCK_ROWS,), tl.float32)
            merged = tl.zeros((BLOCK_ROWS, BLOCK_DIM), tl.float32)
            in_area = row[:, None] * BLOCK_DIM + channel[None, :]
            for i in tl.static_range(NUM_SPLITS):
                other_split = task * NUM_SPLITS + i
                theirs = stats + other_split * 2 * BLOCK_ROWS
                part = tl.load(partial_sums + other_split * area + in_area, cache_modifier=".cg")
                part_peak = tl.load(theirs, cache_modifier=".cg")
                part_sum = tl.load(theirs + BLOCK_ROWS, cache_modifier=".cg")
                new_peak = tl.maximum(peak, part_peak)
                kept, added = tl.exp2(peak - new_peak), tl.exp2(part_peak - new_peak)
                sum_of_weights = sum_of_weights * kept + part_sum * added
                merged = merged * kept[:, None] + part * added[:, None]
                peak = new_peak
            merged *= (v_unit / sum_of_weights)[:, None]
            target = out + rows[:, None] * HEAD_DIM + channel[None, :]
            store_attended(merged, scale, target, q_mask, plain.dtype, QUANTIZE)
    else:
        target = out + rows[None, :] * HEAD_DIM + channel[:, None]
        is_here = row_mask[None, :] & channel_mask[:, None]
        attended = acc * (v_unit / total)[None, :]
        store_attended(attended, scale, target, is_here, plain.dtype, QUANTIZE)


@triton.jit
def store_attended(attended, scale, target, mask, dtype: tl.constexpr, QUANTIZE: tl.constexpr):
    """Rounds to `dtype`, then with QUANTIZE to e4m3."""
    attended = attended.to(dtype)
    if QUANTIZE:
        tl.store(target, quantize(attended.to(tl.float32), tl.load(scale)), mask)
    else:
        tl.store(target, attended, mask)


def decode_attention(
    qkv: torch.Tensor,
    rows: TokenRows,
    block_tables: torch.Tensor,
    positions: torch.Tensor,
    pages: KVPages,
    scale: torch.Tensor | None,
    workspace: Workspace,
    step: Step | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    _, kv_heads, block_size, head_dim = pages.k.shape
    batch_size, heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    group, step = heads // kv_heads, step or step_for(len(qkv), pages.k.dtype)
    if out is None:
        dtype = qkv.dtype if scale is None else E4M3
        out = empty_with_spare_rows(batch_size, heads * head_dim, dtype=dtype, device=qkv.device)
    splits = workspace.num_splits(batch_size * kv_heads, step.crowd, step.max_splits)
    _decode_attention[(batch_size, kv_heads, splits)](
        qkv, rows.cos, rows.sin, rows.slots, pages.k, pages.v, block_tables, positions,
        *pages.scale_tensors, scale, out,
        workspace.partial_sums, workspace.stats, workspace.counters,
        LOG2_E * head_dim**-0.5, block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, TOKENS=block_size,
        QUANTIZE=scale is not None, NUM_SPLITS=splits,
        BLOCK_ROWS=max(_MIN_COLUMNS, triton.next_power_of_2(group)),
        BLOCK_DIM=max(16, triton.next_power_of_2(head_dim)), BLOCK_TOKENS=step.num_tokens,
        num_warps=step.num_warps, num_stages=step.num_stages, **dependent(qkv.device),
    )  # fmt: skip
    return out
