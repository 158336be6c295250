"""The kernels in plain torch, by the numerics contract's words: oracle, and fallback on a CPU.

Rows are [..., size]; a scale is a float32 tensor of one value, and what is given one comes as e4m3.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.inputs.tiling import normalize
from nvlm.model import vision
from nvlm.model.number_formats import fp8


def cut_patches(
    tiles: torch.Tensor, patch_size: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """tiles [num_tiles, S, S, 3] uint8, normalised and cut row by row: [num_tiles * patches,
    width], in front 3 * patch_size^2 numbers in a convolution kernel's order, then zeros."""
    rows = vision.cut_patches(normalize(tiles).to(dtype), patch_size).flatten(0, 1)
    return nn.functional.pad(rows, (0, width - rows.shape[1]))


def embed(
    patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """patches [num_tiles, patches, size] behind the class token [1, 1, size], plus positions
    [1, 1 + patches, size]."""
    return torch.cat((class_token.expand(len(patches), -1, -1), patches), dim=1) + positions


def add_rms_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + delta * layer_scale, and its RMSNorm."""
    if delta is not None:
        assert layer_scale is not None
        hidden = hidden + delta * layer_scale
    return hidden, _quantized(_rms_norm(hidden, weight, eps, hidden.shape[-1]), scale)


def normalize_qk(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, num_real: int
) -> torch.Tensor:
    """q, k, v behind one another, of which q and k are normalised over their first `num_real`
    channels; may be done in place."""
    q, k, v = qkv.chunk(3, dim=-1)
    q, k = (_rms_norm(x, w, eps, num_real) for x, w in ((q, q_weight), (k, k_weight)))
    return torch.cat((q, k, v), dim=-1)


def gelu(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Exact (erf) GELU."""
    return _quantized(nn.functional.gelu(x.to(torch.float32)).to(x.dtype), scale)


def add_merge_norm(
    hidden: torch.Tensor,
    delta: torch.Tensor,
    layer_scale: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    side: int,
) -> torch.Tensor:
    """hidden + delta * layer_scale [num_tiles, 1 + side^2, size] without the class token, 2 x 2
    patches merged, and the LayerNorm of that: [num_tiles, side^2 / 4, 4 * size]."""
    patches = (hidden + delta * layer_scale)[:, 1:].unflatten(1, (side, side))
    merged = vision.pixel_shuffle(patches).flatten(1, 2)
    return nn.functional.layer_norm(merged, merged.shape[-1:], weight, bias, eps)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return fp8.quantize(x, scale)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x @ weight.T * scale + bias: float32 sums, one rounding. x: [T, K], weight: [N, K], e4m3."""
    y = nn.functional.linear(x.to(torch.float32), weight.to(torch.float32)) * scale
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, num_real: int) -> torch.Tensor:
    x32 = x.to(torch.float32)
    variance = x32[..., :num_real].square().mean(-1, keepdim=True)
    return weight * (x32 * torch.rsqrt(variance + eps)).to(x.dtype)


def _quantized(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else fp8.quantize(x, scale)
