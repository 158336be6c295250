"""Triton's form of `fp8.quantize`, inlined into the kernels that end with it, and by itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.model.number_formats.fp8 import E4M3


@triton.jit
def _quotient(x, scale):
    """x / scale as IEEE division rounds it, since an ulp would move ties in e4m3.

    A quotient by the rounded reciprocal, put right by its remainder, is that (Markstein, IBM J.
    Res. Dev. 34, 1990) in 3 instructions a value instead of 12 and a branch. What is beyond 448
    scales is cut off there before, so no infinity meets another, and ends an ulp off 448 at most.
    """
    most = 448.0 * scale
    inside = tl.clamp(x, -most, most, propagate_nan=tl.PropagateNan.ALL)
    reciprocal = tl.div_rn(1.0, scale)
    near = inside * reciprocal
    remainder = tl.fma(-near, scale, inside)
    return tl.fma(remainder, reciprocal, near)


@triton.jit
def quantize(x, scale):
    """x / scale in e4m3."""
    return _quotient(x, scale).to(tl.float8e4nv)


@triton.jit
def quantized(x, scale, ON_GPU: tl.constexpr):
    """The numbers of `quantize` in float32.

    As assembly because the compiler would move e4m3 between threads, byte by byte. ptxas 12.8 (of
    Triton 3.6) then takes one of two bytes from a register that is written later."""
    quotient = _quotient(x, scale)
    if not ON_GPU:
        return quotient.to(tl.float8e4nv).to(tl.float32)
    return tl.inline_asm_elementwise(
        """{ .reg .b16 pair, low, high; .reg .b32 both;
        cvt.rn.satfinite.e4m3x2.f32 pair, $1, $1; cvt.rn.f16x2.e4m3x2 both, pair;
        mov.b32 {low, high}, both; cvt.f32.f16 $0, low; }""",
        "=r,r", [quotient], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def scale_at(place):
    """The scale there; 1 where there is no place, of what is not quantised."""
    scale = 1.0
    if place is not None:
        scale = tl.load(place)
    return scale


@triton.jit
def _quantize_tensor(x, scale, y, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    values = tl.load(x + index, mask, other=0.0).to(tl.float32)
    tl.store(y + index, quantize(values, tl.load(scale)), mask)


def quantize_tensor(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in e4m3. x: contiguous."""
    assert x.is_contiguous()
    y, block = torch.empty_like(x, dtype=E4M3), 2048
    grid = (triton.cdiv(x.numel(), block),)
    _quantize_tensor[grid](x, scale, y, x.numel(), BLOCK=block, num_warps=4)
    return y
