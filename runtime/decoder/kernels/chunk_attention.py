"""Triton: attention of chunks of prompts, whole ones among them, all of a step in one launch.

A program takes a tile of one sequence's rows, with all query heads of one KV head, over one
split of the positions up to theirs. Their keys and values were gathered before
(gather_contexts.py). Which rows a tile has stands in device memory, so that a CUDA graph serves
every division of its rows. With few rows, contexts are split so that every multiprocessor has its
programs; the split that ends last merges them all, always in the same order (Flash-Decoding:
crfm.stanford.edu, 2023). FlashAttention-2: arXiv 2307.08691.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nvlm.planning.hopper import CONTEXT_STEP
from runtime.decoder.kernels.decode_attention import LOG2_E, store_attended
from runtime.decoder.kernels.gather_contexts import gather_contexts
from runtime.decoder.kernels.operands import ChunkTiles, Contexts, KVPages
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.quantization import scale_at

_MAX_SPLITS = 4  # of a context: what one program merges


@triton.jit
def _attend(
    queries, row_position, largest, total, acc, begin, end, k_context, v_context, first_row,
    exponent_scale, BLOCK_TOKENS: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Adds the positions of steps begin to end - 1. With IS_CAUSAL a row sees no later ones, else
    all rows see all of them."""
    for step in range(begin, end):
        k = k_context.load([first_row + step * BLOCK_TOKENS, 0])
        v = v_context.load([first_row + step * BLOCK_TOKENS, 0])
        scores = tl.dot(queries, tl.trans(k))
        if IS_CAUSAL:
            position = step * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
            scores = tl.where(position[None, :] <= row_position[:, None], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * exponent_scale)
        peak = new_largest
        if IS_CAUSAL:  # a row may see no position of a split
            peak = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores * exponent_scale - peak[:, None])
        decay = tl.exp2(largest - peak)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
        largest = new_largest
    return largest, total, acc


@triton.jit
def _chunk_attention(
    q, tiles, k_context, v_context, k_scale, v_scale, scale, out, partial_sums, partial_stats,
    counters, exponent_scale, num_positions, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, QUANTIZE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    GROUP_ROWS: tl.constexpr, TILE_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    # The last tiles of a chunk see most: they begin first.
    kv_head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    row, channel = tl.arange(0, TILE_TOKENS * GROUP_ROWS), tl.arange(0, BLOCK_DIM)
    token, head = row // GROUP_ROWS, row % GROUP_ROWS
    k_unit, v_unit = scale_at(k_scale), scale_at(v_scale)
    wait_for_previous(ON_GPU)
    first_row, num_rows = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
    first_position, context = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
    if num_rows > 0:
        is_row = (token < num_rows) & (head < GROUP)
        mask = is_row[:, None] & (channel < HEAD_DIM)[None, :]
        index = (first_row + token).to(tl.int64) * KV_HEADS + kv_head
        place = ((index * GROUP + head) * HEAD_DIM)[:, None] + channel[None, :]
        plain = tl.load(q + place, mask, other=0.0)
        # As in decode_attention.py: float16 loses nothing that queries need.
        queries = plain.to(k_context.dtype)
        largest = tl.full((TILE_TOKENS * GROUP_ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((TILE_TOKENS * GROUP_ROWS,), tl.float32)
        acc = tl.zeros((TILE_TOKENS * GROUP_ROWS, BLOCK_DIM), tl.float32)
        row_position = first_position + token
        num_open = (first_position + 1) // BLOCK_TOKENS  # steps whose positions every row sees
        num_steps = tl.cdiv(first_position + num_rows, BLOCK_TOKENS)
        steps_per_split = tl.cdiv(num_steps, NUM_SPLITS)
        split = tl.program_id(2)
        begin = split * steps_per_split
        end = tl.minimum(begin + steps_per_split, num_steps)
        context_row = kv_head * num_positions + context
        exponent_scale *= k_unit
        largest, total, acc = _attend(
            queries, row_position, largest, total, acc, begin, tl.minimum(end, num_open),
            k_context, v_context, context_row, exponent_scale, BLOCK_TOKENS, False,
        )  # fmt: skip
        largest, total, acc = _attend(
            queries, row_position, largest, total, acc, tl.maximum(begin, num_open), end,
            k_context, v_context, context_row, exponent_scale, BLOCK_TOKENS, True,
        )  # fmt: skip
        is_last = True
        if NUM_SPLITS > 1:
            task = tile * KV_HEADS + kv_head
            area: tl.constexpr = TILE_TOKENS * GROUP_ROWS * BLOCK_DIM
            in_area = row[:, None] * BLOCK_DIM + channel[None, :]
            sums = partial_sums + task * (NUM_SPLITS * area) + in_area
            peaks = partial_stats + task * (NUM_SPLITS * 2 * TILE_TOKENS * GROUP_ROWS) + row
            totals = peaks + TILE_TOKENS * GROUP_ROWS
            stride: tl.constexpr = 2 * TILE_TOKENS * GROUP_ROWS
            tl.store(sums + split * area, acc, is_row[:, None])
            tl.store(peaks + split * stride, largest)
            tl.store(totals + split * stride, total)
            tl.debug_barrier()
            is_last = tl.atomic_add(counters + task, 1, sem="acq_rel") == NUM_SPLITS - 1
            if is_last:
                tl.store(counters + task, 0)  # ready for the next launch
                # Past the first level of cache: other multiprocessors wrote them. Every row sees
                # the first split's first position.
                largest = tl.load(peaks, cache_modifier=".cg")
                total = tl.load(totals, cache_modifier=".cg")
                acc = tl.load(sums, is_row[:, None], 0.0, cache_modifier=".cg")
                for i in tl.static_range(1, NUM_SPLITS):
                    part_peak = tl.load(peaks + i * stride, cache_modifier=".cg")
                    part_total = tl.load(totals + i * stride, cache_modifier=".cg")
                    part = tl.load(sums + i * area, is_row[:, None], 0.0, cache_modifier=".cg")
                    peak = tl.maximum(largest, part_peak)
                    kept, added = tl.exp2(largest - peak), tl.exp2(part_peak - peak)
                    total = total * kept + part_total * added
                    acc = acc * kept[:, None] + part * added[:, None]
                    largest = peak
        if is_last:
            attended = acc * (v_unit / total)[:, None]
            store_attended(attended, scale, out + place, mask, plain.dtype, QUANTIZE)


def chunk_attention(
    q: torch.Tensor,
    tiles: ChunkTiles,
    contexts: Contexts,
    pages: KVPages,
    scale: torch.Tensor | None,
    out: torch.Tensor,
    workspace: Workspace,
) -> None:
    gather_contexts(pages, contexts)
    _, kv_heads, _, head_dim = pages.k.shape
    _, num_positions, block_dim = contexts.k.shape
    group = q.shape[1] // kv_heads
    k_context, v_context = (
        TensorDescriptor.from_tensor(each.view(-1, block_dim), [CONTEXT_STEP, block_dim])
        for each in (contexts.k, contexts.v)
    )
    num_tasks = kv_heads * -(-len(q) // tiles.num_tokens)
    max_splits = min(_MAX_SPLITS, workspace.num_places // (kv_heads * len(tiles.rows)))
    splits = workspace.num_splits(num_tasks, 1, max_splits)
    _chunk_attention[(kv_heads, len(tiles.rows), splits)](
        q, tiles.rows, k_context, v_context, *pages.scale_tensors, scale, out,
        workspace.partial_sums, workspace.stats, workspace.counters,
        LOG2_E * head_dim**-0.5, num_positions,
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim,
        QUANTIZE=scale is not None, NUM_SPLITS=splits, GROUP_ROWS=triton.next_power_of_2(group),
        TILE_TOKENS=tiles.num_tokens, BLOCK_DIM=block_dim, BLOCK_TOKENS=CONTEXT_STEP,
        num_warps=4, num_stages=3, **dependent(q.device),
    )  # fmt: skip
