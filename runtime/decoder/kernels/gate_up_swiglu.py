"""Triton: the FP8 linear of gate and up, SwiGLU and quantise for few rows, in the time of reading
the weights once.

Stream-K (arXiv 2301.03598): the (tile of output columns, step along K) units are dealt out to the
programs in equal contiguous shares, so every multiprocessor reads the same number of bytes. A tile
that several programs share is added up by whichever ends last, in the programs' order: the result
depends neither on that nor on the other rows. Weights are the tall operand of the product and the
few tokens the narrow one, as tensor cores want 64 rows there. A tile's columns are those of gate
and, after them, the same ones of up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.model.number_formats.fp8 import E4M3
from runtime.decoder.kernels.elementwise import swiglu
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.kernels.load_ahead import load_and_forget
from runtime.kernels.quantization import quantize
from runtime.kernels.spare_rows import empty_with_spare_rows

MAX_ROWS = 16
"""Up to which it is ahead of cuBLASLt and SwiGLU on an H100 and an H200."""

TILE_COLUMNS = 64
_DEPTH = 256
_UNITS_EARLY = 4  # a program's own units that it loads before the kernel before has ended
_SECTOR_BYTES = 32  # what one load brings


@triton.jit
def _ask_early(
    weight, unit, end, steps, size, K, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    SECTOR_BYTES: tl.constexpr, NUM_UNITS: tl.constexpr,
):  # fmt: skip
    """Asks the second level of cache for the weights of a program's first units."""
    half: tl.constexpr = COLUMNS // 2
    sectors: tl.constexpr = DEPTH // SECTOR_BYTES
    lane = tl.arange(0, COLUMNS * sectors)
    column = lane // sectors
    for i in tl.static_range(NUM_UNITS):
        if unit + i < end:
            channel = (unit + i) // steps * half + column % half
            row = tl.where(channel < size, channel + column // half * size, 0)
            k = tl.minimum((unit + i) % steps * DEPTH + lane % sectors * SECTOR_BYTES, K - 4)
            load_and_forget(weight + row.to(tl.int64) * K + k)


@triton.jit
def _gate_up_swiglu(
    x, weight, scale, product_scale, product, partial_sums, counters, num_rows, size, K,
    units_per_program,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, NUM_UNITS_EARLY: tl.constexpr,
    SECTOR_BYTES: tl.constexpr, DTYPE: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = COLUMNS // 2
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    program = tl.program_id(0)
    steps = tl.cdiv(K, DEPTH)
    unit = program * units_per_program
    end = tl.minimum(unit + units_per_program, tl.cdiv(size, half) * steps)
    if ON_GPU:
        _ask_early(weight, unit, end, steps, size, K, COLUMNS, DEPTH, SECTOR_BYTES, NUM_UNITS_EARLY)
    wait_for_previous(ON_GPU)
    inside = column[:, None] * ROWS + row[None, :]
    area: tl.constexpr = ROWS * COLUMNS
    while unit < end:
        tile = unit // steps
        first = unit - tile * steps
        last = tl.minimum(steps, first + end - unit)
        channel = tile * half + column % half
        source = (channel + column // half * size).to(tl.int64)[:, None] * K
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        for step in range(first, last):
            k = step * DEPTH + tl.arange(0, DEPTH)
            w_mask = (channel < size)[:, None] & (k < K)[None, :]
            x_mask = (row < num_rows)[None, :] & (k < K)[:, None]
            w = tl.load(weight + source + k[None, :], w_mask, other=0.0)
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
            sums = (acc * tl.load(scale)).to(DTYPE).to(tl.float32)
            gate, up = tl.split(tl.permute(tl.reshape(sums, (2, half, ROWS)), (1, 2, 0)))
            values = quantize(swiglu(gate, up, DTYPE), tl.load(product_scale))
            target = tile * half + tl.arange(0, half)
            mask = (target < size)[:, None] & (row < num_rows)[None, :]
            tl.store(product + row[None, :] * size + target[:, None], values, mask)
        unit += last - first


def gate_up_swiglu(
    x: torch.Tensor, gate_up: Fp8Linear, down: Fp8Linear, dtype: torch.dtype, workspace: Workspace
) -> torch.Tensor:
    num_rows, depth = x.shape
    size = len(gate_up.weight) // 2
    assert num_rows <= MAX_ROWS, f"{num_rows} rows, at most {MAX_ROWS} stream"
    num_units = triton.cdiv(size, TILE_COLUMNS // 2) * triton.cdiv(depth, _DEPTH)
    product = empty_with_spare_rows(num_rows, size, dtype=E4M3, device=x.device)
    _gate_up_swiglu[(workspace.num_programs,)](
        x, gate_up.weight, gate_up.scale, down.activation_scale, product,
        workspace.partial_sums, workspace.counters,
        num_rows, size, depth, triton.cdiv(num_units, workspace.num_programs),
        ROWS=MAX_ROWS, COLUMNS=TILE_COLUMNS, DEPTH=_DEPTH, NUM_UNITS_EARLY=_UNITS_EARLY,
        SECTOR_BYTES=_SECTOR_BYTES, DTYPE=_TRITON_TYPES[dtype],
        num_warps=4, num_stages=5, **dependent(x.device),
    )  # fmt: skip
    return product


_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
