"""An FP8 linear as ONNX states it: QuantizeLinear and DequantizeLinear around a product.

TensorRT turns DQ(weight), DQ(Q(x)) and the MatMul behind them into one FP8 GEMM; TensorRT-LLM's
FP8Linear (tensorrt_llm/quantization/layers.py) makes the same pattern where it uses no plugin.
ONNX's QuantizeLinear saturates, so it is the numerics contract's e4m3(clamp(x / s_a)).
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model.number_formats import LinearScales, fp8


class QdqLinear(nn.Module):
    """For export only. x: [..., in_features] in `dtype` -> [..., out_features] in `dtype`.

    ONNX wants scales in the type of x. Calibrated ones are rounded up to it, so nothing clips, and
    the weight is quantised anew with the rounded one, so both sides of the product agree. In
    float32 that changes nothing.
    """

    weight_scale: torch.Tensor
    activation_scale: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: LinearScales,
    ) -> None:
        """weight: [out_features, in_features] in `dtype`, not yet quantised."""
        super().__init__()
        scale = round_up(scales.weight, weight.dtype)
        self.weight = nn.Parameter(fp8.quantize(weight, scale.float()), requires_grad=False)
        self.bias = bias
        self.register_buffer("weight_scale", scale)
        self.register_buffer("activation_scale", round_up(scales.activation, weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        symbolic = torch.onnx.ops.symbolic
        zero = torch.zeros((), dtype=fp8.E4M3)  # tells the type to quantise to
        quantised = symbolic(
            "QuantizeLinear", [x, self.activation_scale, zero], dtype=fp8.E4M3, shape=x.shape
        )
        activation = symbolic(
            "DequantizeLinear", [quantised, self.activation_scale], dtype=x.dtype, shape=x.shape
        )
        weight = symbolic(
            "DequantizeLinear",
            [self.weight, self.weight_scale],
            dtype=x.dtype,
            shape=self.weight.shape,
        )
        return nn.functional.linear(activation, weight, self.bias)


def round_up(scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The smallest number of `dtype` that is not below `scale`, as a scalar tensor."""
    exact = torch.tensor(scale, dtype=torch.float32)
    rounded = exact.to(dtype)
    if rounded.float() < exact:
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        rounded = (rounded.view(bits) + 1).view(dtype)  # the next one, of positive numbers
    return rounded
