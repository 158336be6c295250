"""Triton: the last residual, 2 x 2 patches merged to a token's channels, and the projector's
LayerNorm. A program makes one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from runtime.vision.kernels.operands import ScaledDelta


@triton.jit
def _add_merge_norm(
    hidden, delta, layer_scale, weight, bias, out, eps, side, size, BLOCK: tl.constexpr
):  # fmt: skip
    token, half = tl.program_id(0), side // 2
    tile, y, x = token // (half * half), token // half % half, token % half
    patch = tl.arange(0, 4)[:, None]  # the cell's: top left, top right, bottom left, bottom right
    position = 1 + (2 * y + patch // 2) * side + 2 * x + patch % 2  # after the class token
    source = (tile.to(tl.int64) * (1 + side * side) + position) * size
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < size
    added = tl.load(delta + source + columns, mask, other=0.0).to(tl.float32)
    factor = tl.load(layer_scale + columns, mask, other=0.0).to(tl.float32)
    values = tl.load(hidden + source + columns, mask, other=0.0)
    scaled = (added * factor).to(values.dtype).to(tl.float32)
    values = (values.to(tl.float32) + scaled).to(values.dtype).to(tl.float32)

    width = 4 * size
    centred = tl.where(mask, values - tl.sum(values) / width, 0.0)
    normalised = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
    channels = patch * size + columns
    w = tl.load(weight + channels, mask, other=0.0).to(tl.float32)
    b = tl.load(bias + channels, mask, other=0.0).to(tl.float32)
    target = out + token.to(tl.int64) * width + channels
    tl.store(target, (normalised * w + b).to(out.dtype.element_ty), mask)


def add_merge_norm(
    hidden: torch.Tensor, added: ScaledDelta, norm: nn.LayerNorm, side: int
) -> torch.Tensor:
    num_tiles, _, size = hidden.shape
    num_tokens = (side // 2) ** 2
    out = hidden.new_empty(num_tiles, num_tokens, 4 * size)
    _add_merge_norm[(num_tiles * num_tokens,)](
        hidden, added.delta, added.layer_scale, norm.weight, norm.bias, out, norm.eps, side, size,
        # Fused, product and sum would be rounded once where InternViT rounds twice.
        BLOCK=triton.next_power_of_2(size), num_warps=16, enable_fp_fusion=False,
    )  # fmt: skip
    return out
