"""Triton: residual + RMSNorm + quantise, and SwiGLU + quantise. A program holds one row, or a
piece of one for SwiGLU, which needs no sum over it. Every load is asked for before the first use:
with few rows their latency is what these kernels take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.model.number_formats.fp8 import E4M3
from runtime.decoder.kernels import norm_row
from runtime.decoder.kernels.operands import Norm
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.quantization import quantize
from runtime.kernels.spare_rows import empty_with_spare_rows

_FEW_ROWS = 16  # they leave most of the GPU idle, so each gets more threads


@triton.jit
def _add_rms_norm(
    hidden, delta, weight, scale, new_hidden, normed, eps, size,
    HAS_DELTA: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    w = tl.load(weight + columns, mask, other=0.0)
    wait_for_previous(ON_GPU)
    x = tl.load(hidden + row + columns, mask, other=0.0)
    if HAS_DELTA:
        x = norm_row.add(x, tl.load(delta + row + columns, mask, other=0.0))
        tl.store(new_hidden + row + columns, x, mask)
    values = norm_row.rms_norm(x, w, scale, size, eps, QUANTIZE)
    tl.store(normed + row + columns, values, mask)


def add_rms_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    norm: Norm,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, size = hidden.shape
    new_hidden = hidden if delta is None else torch.empty_like(hidden)
    dtype = hidden.dtype if scale is None else E4M3
    normed = empty_with_spare_rows(num_tokens, size, dtype=dtype, device=hidden.device)
    _add_rms_norm[(num_tokens,)](
        hidden, delta, norm.weight, scale, new_hidden, normed, norm.eps, size,
        HAS_DELTA=delta is not None, QUANTIZE=scale is not None,
        BLOCK=triton.next_power_of_2(size), num_warps=32 if num_tokens <= _FEW_ROWS else 8,
        **dependent(hidden.device),
    )  # fmt: skip
    return new_hidden, normed


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of float32 numbers, rounded to `dtype` and float32 again."""
    return (gate / (1.0 + tl.exp(-gate)) * up).to(dtype).to(tl.float32)


@triton.jit
def _swiglu_quantize(gate_up, scale, product, size, BLOCK: tl.constexpr, ON_GPU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    s = tl.load(scale)
    wait_for_previous(ON_GPU)
    gate = tl.load(gate_up + row * 2 * size + columns, mask, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask, other=0.0)
    rounded = swiglu(gate.to(tl.float32), up.to(tl.float32), gate.dtype)
    tl.store(product + row * size + columns, quantize(rounded, s), mask)


def swiglu_quantize(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(num_tokens, size, dtype=E4M3, device=gate_up.device)
    block = 1024
    _swiglu_quantize[(num_tokens, triton.cdiv(size, block))](
        gate_up, scale, product, size, BLOCK=block, num_warps=4, **dependent(gate_up.device)
    )
    return product
