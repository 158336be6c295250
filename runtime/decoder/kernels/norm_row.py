"""Triton: what the norm kernels do with a row that is added up, inlined into each."""

from __future__ import annotations

import triton
import triton.language as tl

from runtime.kernels.quantization import quantize


@triton.jit
def add(x, added):
    """x + added in x's type, `added` rounded to it first, as one rank rounds a linear's result."""
    return (x.to(tl.float32) + added.to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def rms_norm(x, weight, scale, size, eps, QUANTIZE: tl.constexpr):
    """RMSNorm of a row that one program holds, 0 beyond `size`; e4m3 with QUANTIZE."""
    x32 = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x32 * x32) / size + eps)
    normed = (x32 * factor * weight.to(tl.float32)).to(x.dtype)
    values = normed
    if QUANTIZE:
        values = quantize(normed.to(tl.float32), tl.load(scale))
    return values
