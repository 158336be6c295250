"""Triton: an FP8 linear for few rows, whose time is that of reading its weights once.

Stream-K (arXiv 2301.03598): the (tile of output columns, step along K) units are dealt out to the
programs in equal contiguous shares, so every multiprocessor reads the same number of bytes. A tile
that several programs share is added up by whichever ends last, in the programs' order: the result
depends neither on that nor on the other rows. Weights are the tall operand of the product and the
few tokens the narrow one, as tensor cores want 64 rows there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from runtime.decoder.kernels.workspace import Workspace

MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program holds in a step. num_stages: steps whose loads are under way."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


def tile_for(num_rows: int) -> Tile:
    """A guess from shared memory (two programs a multiprocessor); bench/hopper_linears.py tries
    others."""
    return Tile(64, 256, 4, 5) if num_rows <= 16 else Tile(128, 128, 4, 4)


@triton.jit
def _streaming_linear(
    x, weight, scale, bias, y, partial_sums, counters, num_rows, N, K, units_per_program,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    program = tl.program_id(0)
    steps = tl.cdiv(K, DEPTH)
    unit = program * units_per_program
    end = tl.minimum(unit + units_per_program, tl.cdiv(N, COLUMNS) * steps)
    inside = column[:, None] * ROWS + row[None, :]
    area: tl.constexpr = ROWS * COLUMNS
    while unit < end:
        tile = unit // steps
        first = unit - tile * steps
        last = tl.minimum(steps, first + end - unit)
        columns = tile * COLUMNS + column
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        for step in range(first, last):
            k = step * DEPTH + tl.arange(0, DEPTH)
            w_mask = (columns < N)[:, None] & (k < K)[None, :]
            x_mask = (row < num_rows)[None, :] & (k < K)[:, None]
            w = tl.load(weight + columns.to(tl.int64)[:, None] * K + k[None, :], w_mask, other=0.0)
            tokens = tl.load(x + row[None, :] * K + k[:, None], x_mask, other=0.0)
            # Tensor cores add e4m3 products with 14 bits; every 128 of them go to float32.
            acc = tl.dot(w, tokens, acc, max_num_imprecise_acc=128)
        is_done = last - first == steps
        if not is_done:
            first_program = tile * steps // units_per_program
            num_parts = ((tile + 1) * steps - 1) // units_per_program - first_program + 1
            # A program leaves at most two tiles unfinished: its first and its last.
            place = 2 * program
            if first == 0:
                place += 1
            tl.store(partial_sums + place * area + inside, acc)
            tl.debug_barrier()
            is_done = tl.atomic_add(counters + tile, 1, sem="acq_rel") == num_parts - 1
            if is_done:
                tl.store(counters + tile, 0)
                acc = tl.zeros((COLUMNS, ROWS), tl.float32)
                for part in range(num_parts):
                    place = 2 * (first_program + part)
                    if part == 0:
                        place += 1
                    # Past the first level of cache: other multiprocessors wrote them.
                    acc += tl.load(partial_sums + place * area + inside, cache_modifier=".cg")
        if is_done:
            total = acc * tl.load(scale)
            if HAS_BIAS:
                total += tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[:, None]
            mask = (columns < N)[:, None] & (row < num_rows)[None, :]
            target = y + row[None, :] * N + columns[:, None]
            tl.store(target, total.to(y.dtype.element_ty), mask)
        unit += last - first


def streaming_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    workspace: Workspace,
    tile: Tile | None = None,
) -> torch.Tensor:
    num_rows, depth = x.shape
    num_columns = weight.shape[0]
    assert num_rows <= MAX_ROWS, f"{num_rows} rows, at most {MAX_ROWS} stream"
    tile = tile or tile_for(num_rows)
    num_units = triton.cdiv(num_columns, tile.columns) * triton.cdiv(depth, tile.depth)
    y = torch.empty(num_rows, num_columns, dtype=dtype, device=x.device)
    _streaming_linear[(workspace.num_programs,)](
        x, weight, scale, bias, y, workspace.partial_sums, workspace.counters,
        num_rows, num_columns, depth, triton.cdiv(num_units, workspace.num_programs),
        HAS_BIAS=bias is not None, ROWS=max(16, triton.next_power_of_2(num_rows)),
        COLUMNS=tile.columns, DEPTH=tile.depth,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y
