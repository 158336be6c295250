"""A linear layer that computes what the numerics contract says, on any device.

This is the plain torch form: exact, device independent, and the oracle of faster kernels.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model import fp8


class QuantizableLinear(nn.Module):
    """y = round_dtype(x @ weight.T * (s_a * s_w) + bias), products and sums in float32.

    With FP8 scales, x is first quantised to e4m3(clamp(x / s_a)) and `weight` holds e4m3 values;
    without, both scales are 1. x: [..., in_features] in `dtype`; y: [..., out_features] in
    `output_dtype` (default: x's dtype).

    The weight stays in the type it is stored in and is widened to float32 at each use;
    `widen()` does that once and for all where memory allows (four bytes per value).
    """

    scales: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        weight_scale: float = 1.0,
        activation_scale: float | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        is_fp8 = weight.dtype == fp8.E4M3
        assert is_fp8 == (activation_scale is not None), "FP8 weights need an activation scale"
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.is_fp8 = is_fp8
        scales = torch.tensor([weight_scale, activation_scale or 1.0], device=weight.device)
        self.register_buffer("scales", scales, persistent=False)  # of weight and activation
        self.output_dtype = output_dtype

    def widen(self) -> None:
        self.weight = nn.Parameter(self.weight.to(torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.output_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(torch.float32)
        weight = self.weight.to(torch.float32)
        if not self.is_fp8:
            return nn.functional.linear(x.to(torch.float32), weight, bias).to(dtype)
        weight_scale, activation_scale = self.scales
        x = fp8.quantize(x, activation_scale).to(torch.float32)
        y = nn.functional.linear(x, weight) * (activation_scale * weight_scale)
        return (y if bias is None else y + bias).to(dtype)
