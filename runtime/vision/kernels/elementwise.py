"""Triton: residual with layer scale + RMSNorm + quantise, norm of q and k, and GELU + quantise.

A program holds one row for the norms, else a piece of the whole. Roundings are InternViT's: a norm
is rounded before it is multiplied by its weight (docs/numerics.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.model.number_formats.fp8 import E4M3
from nvlm.model.vision import RMSNorm
from runtime.kernels.quantization import quantize
from runtime.vision.kernels.operands import ScaledDelta


@triton.jit
def _add_rms_norm(
    hidden, delta, layer_scale, weight, scale, new_hidden, normed, eps, size,
    HAS_DELTA: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(hidden + row + columns, mask, other=0.0)
    w = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    dtype = x.dtype
    if HAS_DELTA:
        y = tl.load(delta + row + columns, mask, other=0.0).to(tl.float32)
        factor = tl.load(layer_scale + columns, mask, other=0.0).to(tl.float32)
        scaled = (y * factor).to(dtype).to(tl.float32)
        x = (x.to(tl.float32) + scaled).to(dtype)
        tl.store(new_hidden + row + columns, x, mask)
    x32 = x.to(tl.float32)
    normalised = (x32 * tl.rsqrt(tl.sum(x32 * x32) / size + eps)).to(dtype)
    rounded = (normalised.to(tl.float32) * w).to(dtype)
    if QUANTIZE:
        tl.store(normed + row + columns, quantize(rounded.to(tl.float32), tl.load(scale)), mask)
    else:
        tl.store(normed + row + columns, rounded, mask)


def add_rms_norm(
    hidden: torch.Tensor,
    added: ScaledDelta | None,
    norm: RMSNorm,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = hidden.shape[-1]
    delta, layer_scale = (None, None) if added is None else (added.delta, added.layer_scale)
    new_hidden = hidden if delta is None else torch.empty_like(hidden)
    normed = torch.empty_like(hidden, dtype=hidden.dtype if scale is None else E4M3)
    _add_rms_norm[(hidden.numel() // size,)](
        hidden, delta, layer_scale, norm.weight, scale, new_hidden, normed, norm.eps, size,
        HAS_DELTA=delta is not None, QUANTIZE=scale is not None,
        # Fused, product and sum would be rounded once where InternViT rounds twice.
        BLOCK=triton.next_power_of_2(size), num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return new_hidden, normed


@triton.jit
def _normalize_qk(qkv, q_weight, k_weight, eps, size, num_real, BLOCK: tl.constexpr):
    part = tl.program_id(1)  # 0: q, 1: k
    row = (tl.program_id(0).to(tl.int64) * 3 + part) * size
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    x = tl.load(qkv + row + columns, mask, other=0.0)
    x32 = x.to(tl.float32)
    real = tl.where(columns < num_real, x32, 0.0)
    normalised = (x32 * tl.rsqrt(tl.sum(real * real) / num_real + eps)).to(x.dtype)
    weight = q_weight
    if part == 1:
        weight = k_weight
    w = tl.load(weight + columns, mask, other=0.0).to(tl.float32)
    tl.store(qkv + row + columns, (normalised.to(tl.float32) * w).to(x.dtype), mask)


def normalize_qk(qkv: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> torch.Tensor:
    size = qkv.shape[-1] // 3
    _normalize_qk[(qkv.numel() // (3 * size), 2)](
        qkv, q_norm.weight, k_norm.weight, q_norm.eps, size, q_norm.num_real_channels,
        BLOCK=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip
    return qkv


@triton.jit
def _exact_gelu(x):
    """x Phi(x) = max(x, 0) - |x| Phi(-|x|) within a relative 4.5e-6. log2 Phi(-u) is a polynomial
    of degree 7, fitted on Chebyshev nodes of [0, 6], where Phi is 1e-9 at the end: a quarter of the
    instructions of the error function, which takes longer than the memory."""
    u = tl.minimum(tl.abs(x), 6.0)
    log2 = 6.26813998679e-05 - u * 1.88962622e-06
    log2 = 0.00853946153 + u * (-0.000938867917 + u * log2)
    log2 = -0.458409786 + u * (-0.0540206879 + u * log2)
    log2 = -0.999994338 + u * (-1.15126920 + u * log2)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - u * tl.exp2(log2)


@triton.jit
def _gelu(x, scale, y, size, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    values = tl.load(x + index, mask, other=0.0)
    x32 = values.to(tl.float32)
    activated = _exact_gelu(x32).to(values.dtype)
    if QUANTIZE:
        tl.store(y + index, quantize(activated.to(tl.float32), tl.load(scale)), mask)
    else:
        tl.store(y + index, activated, mask)


def gelu(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    y = torch.empty_like(x, dtype=x.dtype if scale is None else E4M3)
    block = 2048 if scale is None else 4096  # what is once a thread weighs on more instructions
    _gelu[(triton.cdiv(x.numel(), block),)](
        x, scale, y, x.numel(), QUANTIZE=scale is not None, BLOCK=block, num_warps=4
    )
    return y
