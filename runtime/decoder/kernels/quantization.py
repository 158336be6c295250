"""Triton's form of `fp8.quantize`, inlined into the kernels that end with it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quantize(x, scale):
    """`div_rn` because Triton's `/` is off by an ulp or two, which moves ties in e4m3."""
    scaled = tl.div_rn(x, scale)
    clamped = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return clamped.to(tl.float8e4nv)
