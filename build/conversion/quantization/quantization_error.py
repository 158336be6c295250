"""What a number format does to a linear, measured on rows of calibration data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from build.conversion.quantization.cast import row_blocks
from nvlm.model.number_formats import LinearScales, NumberFormat


@dataclass(frozen=True, slots=True)
class QuantizationError:
    """The errors that `LinearReport` names."""

    weight_error: float  # relative 2-norm
    output_error: float  # relative 2-norm
    clipped_share: float  # of the input's values, 0 to 1
    underflow_share: float  # of the input's values, 0 to 1


def quantization_error(
    x: torch.Tensor, weight: torch.Tensor, number_format: NumberFormat, scales: LinearScales
) -> QuantizationError:
    """x: [rows, in_features], weight: [out_features, in_features], any float dtype.

    Sums of squares in float64, products in float32, a block of the weight at a time. The bias is
    the same on both sides and left out.
    """
    x = x.to(torch.float32)

    def rounded(values: torch.Tensor, scale: float) -> torch.Tensor:
        return number_format.dequantize(number_format.quantize(values, scale), scale)

    dequantised = rounded(x, scales.activation)
    squares = torch.zeros(4, dtype=torch.float64, device=x.device)
    for block in row_blocks(weight):
        rows = block.to(torch.float32)
        rows_quantised = rounded(block, scales.weight)
        y = nn.functional.linear(x, rows)
        quantised_y = nn.functional.linear(dequantised, rows_quantised)
        pairs = (rows_quantised - rows, rows, quantised_y - y, y)
        squares += torch.stack([part.square().sum(dtype=torch.float64) for part in pairs])
    weight_error, output_error = _ratio(squares[0], squares[1]), _ratio(squares[2], squares[3])
    most = number_format.largest * scales.activation * (1 + 1e-6)
    clipped = (x.abs() > most).to(torch.float32).mean()
    lost = ((dequantised == 0) & (x != 0)).to(torch.float32).mean()
    return QuantizationError(weight_error, output_error, float(clipped), float(lost))


def _ratio(error: torch.Tensor, whole: torch.Tensor) -> float:
    return float((error / whole).sqrt()) if whole > 0 else 0.0
