"""The steps of the vision encoder in plain torch, by the numerics contract's words."""

from __future__ import annotations

import torch
from torch import nn

from nvlm.inputs.tiling import normalize
from nvlm.model import vision
from nvlm.model.number_formats import fp8
from nvlm.model.vision import RMSNorm
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.vision.kernels.operands import ScaledDelta


class PlainForms:
    """What each step computes, on any device. Kernels override it; this is their oracle.

    Rows are [..., size]. `scale` is a float32 tensor of one value on the rows' device; what is
    given one comes as e4m3.
    """

    def cut_patches(
        self, tiles: torch.Tensor, patch_size: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """tiles [num_tiles, S, S, 3] uint8, normalised and cut row by row: [num_tiles * patches,
        width], in front 3 * patch_size^2 numbers in a convolution kernel's order, then zeros."""
        rows = vision.cut_patches(normalize(tiles).to(dtype), patch_size).flatten(0, 1)
        return nn.functional.pad(rows, (0, width - rows.shape[1]))

    def embed(
        self, patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """The class token [1, 1, size], then patches [num_tiles, patches, size], plus positions
        [1, 1 + patches, size]."""
        return torch.cat((class_token.expand(len(patches), -1, -1), patches), dim=1) + positions

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        added: ScaledDelta | None,
        norm: RMSNorm,
        scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + delta * layer_scale, and its RMSNorm."""
        if added is not None:
            hidden = hidden + added.delta * added.layer_scale
        return hidden, _quantized(norm(hidden), scale)

    def normalize_qk(self, qkv: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> torch.Tensor:
        """q, k and v side by side, of which q and k are normalised over their first
        `num_real_channels`; may be done in place. Both norms have the same epsilon and count."""
        q, k, v = qkv.chunk(3, dim=-1)
        return torch.cat((q_norm(q), k_norm(k), v), dim=-1)

    def gelu(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Exact (erf) GELU."""
        return _quantized(nn.functional.gelu(x.to(torch.float32)).to(x.dtype), scale)

    def add_merge_norm(
        self, hidden: torch.Tensor, added: ScaledDelta, norm: nn.LayerNorm, side: int
    ) -> torch.Tensor:
        """hidden + delta * layer_scale [num_tiles, 1 + side^2, size] without the class token, 2 x 2
        patches merged, and the LayerNorm of that: [num_tiles, side^2 / 4, 4 * size]."""
        patches = (hidden + added.delta * added.layer_scale)[:, 1:].unflatten(1, (side, side))
        merged = vision.pixel_shuffle(patches).flatten(1, 2)
        return nn.functional.layer_norm(merged, merged.shape[-1:], norm.weight, norm.bias, norm.eps)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fp8.quantize(x, scale)

    def linear(self, x: torch.Tensor, linear: Fp8Linear, dtype: torch.dtype) -> torch.Tensor:
        """x @ weight.T * scale + bias: float32 sums, one rounding. x: [T, in_features] e4m3."""
        return fp8.product(x, linear.weight, linear.scale, linear.bias).to(dtype)


def _quantized(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return x if scale is None else fp8.quantize(x, scale)
