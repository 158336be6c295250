"""A linear layer that computes what the numerics contract says, on any device.

This is the plain torch form: exact, device independent, and the oracle of faster kernels.
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model.number_formats import UNQUANTIZED, LinearScales, NumberFormat


class QuantizableLinear(nn.Module):
    """y = round_dtype(x @ weight.T + bias), multiplied as its number format says.

    x: [..., in_features] in `dtype`; y: [..., out_features] in `output_dtype` (default: x's
    dtype). weight: [out_features, in_features] as the format stores it; scales: what it has.

    The weight stays in the type it is stored in and is widened to float32 at each use;
    `widen()` does that once and for all where memory allows (four bytes per value).
    """

    scales: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        number_format: NumberFormat = UNQUANTIZED,
        scales: LinearScales | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expected = number_format.stored_dtype(weight.dtype)
        assert weight.dtype == expected, f"weight is {weight.dtype}, its format has {expected}"
        assert bool(number_format.scale_shapes) == (scales is not None), "scales go with a format"
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.number_format = number_format
        values = None
        if scales is not None:
            values = torch.tensor([scales.weight, scales.activation], device=weight.device)
        self.register_buffer("scales", values, persistent=False)
        self.output_dtype = output_dtype

    @classmethod
    def quantised(
        cls,
        linear: nn.Linear | QuantizableLinear,
        number_format: NumberFormat,
        scales: LinearScales,
    ) -> QuantizableLinear:
        """`linear`, which holds its weight unquantised, as the format stores it."""
        stored = number_format.quantize(linear.weight, scales.weight)
        return cls(stored, linear.bias, number_format=number_format, scales=scales)

    def widen(self) -> None:
        self.weight = nn.Parameter(self.weight.to(torch.float32), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(torch.float32)
        y = self.number_format.linear(x, self.weight, self.scales, bias)
        return y.to(self.output_dtype or x.dtype)
