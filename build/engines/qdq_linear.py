"""An FP8 linear as ONNX states it: QuantizeLinear and DequantizeLinear around a product.

TensorRT turns DQ(weight), DQ(Q(x)) and the MatMul after them into one FP8 GEMM; TensorRT-LLM's
FP8Linear (tensorrt_llm/quantization/layers.py) makes the same pattern where it uses no plugin.
ONNX's QuantizeLinear saturates, so it is the numerics contract's e4m3(clamp(x / s_a)).
"""

from __future__ import annotations

import torch
from torch import nn

from nvlm.model.number_formats import LinearScales, fp8
from nvlm.model.number_formats.number_format import round_up


class QdqLinear(nn.Module):
    """For export only. x: [..., in_features] in `dtype` -> [..., out_features] in `dtype`.

    ONNX wants scales in the type of x, and a checkpoint's are numbers of its dtype. Only the
    float32 scales of an older checkpoint are rounded here, upwards; the weight is quantised after
    it, so that both sides of the product agree.
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
        dtype = weight.dtype
        weight_scale = torch.tensor(round_up(scales.weight, dtype), dtype=dtype)
        self.weight = nn.Parameter(fp8.quantize(weight, weight_scale), requires_grad=False)
        self.bias = bias
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer(
            "activation_scale", torch.tensor(round_up(scales.activation, dtype), dtype=dtype)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        symbolic = torch.onnx.ops.symbolic
        zero = torch.zeros((), dtype=fp8.E4M3)  # names the type to quantise to
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
