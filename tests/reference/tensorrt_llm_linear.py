"""TensorRT-LLM 1.2.1's FP8Linear and FP8RowLinear on one rank, in plain torch.

Source: tensorrt_llm/quantization/layers.py there. Both stored scales are float32 and both are cast
to the model's dtype. TensorRT makes one FP8 GEMM of Q/DQ around the product: e4m3 times e4m3,
summed in float32, times both scales, plus bias, one rounding. The low-latency and SwiGLU plugins
take x quantised with the cast scale, but multiply by the scales as stored.
"""

from __future__ import annotations

import torch
from torch import nn


class FP8Linear(nn.Module):
    """x: [..., in] in `dtype` -> [..., out] in `dtype`. weight: [out, in] e4m3; bias: [out]; both
    scaling factors: [1] float32, as a checkpoint has them."""

    def __init__(
        self,
        dtype: torch.dtype,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        weights_scaling_factor: torch.Tensor,
        activation_scaling_factor: torch.Tensor,
        *,
        is_plugin: bool,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = weight
        self.bias = bias
        self.cast_activation = activation_scaling_factor.to(dtype).float()
        cast_weight = weights_scaling_factor.to(dtype).float()
        self.alpha = (
            activation_scaling_factor * weights_scaling_factor
            if is_plugin
            else self.cast_activation * cast_weight
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantised = torch.clamp(x.float() / self.cast_activation, -448.0, 448.0)
        quantised = quantised.to(torch.float8_e4m3fn)
        y = nn.functional.linear(quantised.float(), self.weight.float()) * self.alpha
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(self.dtype)
