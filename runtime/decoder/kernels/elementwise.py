"""Triton: residual + RMSNorm + quantise, and SwiGLU + quantise. A program holds one row, or a
piece of one for SwiGLU, which needs no sum over it. Every load is asked for before the first use:
with few rows their latency is what these kernels take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nvlm.fp8 import E4M3
from runtime.kernels.prefetch import NO_PREFETCH, Prefetch, prefetch
from runtime.kernels.quantization import quantize


@triton.jit(do_not_specialize=["num_tokens"])
def _add_rms_norm(
    hidden, delta, weight, scale, new_hidden, normed, eps, size, num_tokens,
    following, following_bytes, following_rows, row_bytes,
    HAS_DELTA: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PREFETCH:
        if tl.program_id(0) >= num_tokens:
            program = tl.program_id(0) - num_tokens
            prefetch(following, program, following_bytes, following_rows, row_bytes, THREADS=256)
            return
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    w = tl.load(weight + columns, mask, other=0.0)
    if QUANTIZE:
        s = tl.load(scale)
    if PDL:
        gdc_wait()
    x = tl.load(hidden + row + columns, mask, other=0.0)
    if HAS_DELTA:
        y = tl.load(delta + row + columns, mask, other=0.0).to(x.dtype)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
        tl.store(new_hidden + row + columns, x, mask)
    x32 = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x32 * x32) / size + eps)
    rounded = (x32 * factor * w.to(tl.float32)).to(x.dtype)
    if QUANTIZE:
        tl.store(normed + row + columns, quantize(rounded.to(tl.float32), s), mask)
    else:
        tl.store(normed + row + columns, rounded, mask)


def add_rms_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    following: torch.Tensor | None = None,
    prefetched: Prefetch = NO_PREFETCH,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, size = hidden.shape
    part = prefetched.of(following)
    new_hidden = hidden if delta is None else torch.empty_like(hidden)
    normed = torch.empty_like(hidden, dtype=hidden.dtype if scale is None else E4M3)
    _add_rms_norm[(num_tokens + part.num_programs(8),)](
        hidden, delta, weight, scale, new_hidden, normed, eps, size, num_tokens,
        part.weights, part.num_bytes, part.rows, part.row_bytes,
        HAS_DELTA=delta is not None, QUANTIZE=scale is not None, PREFETCH=part.num_bytes > 0,
        BLOCK=triton.next_power_of_2(size), PDL=pdl, num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
    return new_hidden, normed


@triton.jit
def _swiglu_quantize(
    gate_up, scale, product, size, following, following_bytes, following_rows, row_bytes,
    BLOCK: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PREFETCH:
        first = tl.cdiv(size, BLOCK)
        if tl.program_id(1) >= first:
            program = (tl.program_id(1) - first) * tl.num_programs(0) + tl.program_id(0)
            prefetch(following, program, following_bytes, following_rows, row_bytes, THREADS=128)
            return
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    s = tl.load(scale)
    if PDL:
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * size + columns, mask, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask, other=0.0).to(tl.float32)
    gate32 = gate.to(tl.float32)
    activated = gate32 / (1.0 + tl.exp(-gate32))
    rounded = (activated * up).to(gate.dtype).to(tl.float32)
    tl.store(product + row * size + columns, quantize(rounded, s), mask)


def swiglu_quantize(
    gate_up: torch.Tensor,
    scale: torch.Tensor,
    following: torch.Tensor | None = None,
    prefetched: Prefetch = NO_PREFETCH,
    pdl: bool = False,
) -> torch.Tensor:
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(num_tokens, size, dtype=E4M3, device=gate_up.device)
    block = 1024
    part = prefetched.of(following)
    extra = triton.cdiv(part.num_programs(4), num_tokens)
    _swiglu_quantize[(num_tokens, triton.cdiv(size, block) + extra)](
        gate_up, scale, product, size, part.weights, part.num_bytes, part.rows, part.row_bytes,
        BLOCK=block, PREFETCH=part.num_bytes > 0, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return product
