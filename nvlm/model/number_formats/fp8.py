"""FP8 E4M3 with one static scale per tensor: real = stored * scale.

E4M3 as in "FP8 Formats for Deep Learning" (arXiv 2209.05433, table 1): largest magnitude 448, no
infinity. Scales follow TensorRT-LLM: amax / 448, for weights, activations and the KV cache; those
of a linear are rounded up to the checkpoint's dtype.
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import nn

from nvlm.model.number_formats.number_format import (
    ACTIVATION_SCALE,
    WEIGHT_SCALE,
    NumberFormat,
)

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
_CHUNK_VALUES = 1 << 18  # a megabyte of float32: the level-2 caches of two cores


def scale_from_amax(amax: float) -> float:
    """The scale that maps `amax` to 448, as float32. An all-zero tensor takes scale 1."""
    if amax == 0.0:
        return 1.0
    scale = float(torch.tensor(amax, dtype=torch.float32) / E4M3_MAX)
    return max(scale, torch.finfo(torch.float32).tiny)


def quantize(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """e4m3(clamp(x / scale, +-448)), nearest even; same shape as `x`.

    The clamp comes before the cast because torch versions differ on what 470 becomes. The scale
    is made a tensor because CUDA divides by a Python number as `x * (1 / scale)`, which rounds
    differently: one value in 2,000 then lands on another e4m3 number than on a CPU.
    """
    divisor = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if x.device.type == "cpu" and x.numel() > _CHUNK_VALUES:
        return _quantize_in_chunks(x, divisor)
    scaled = x.to(torch.float32) / divisor
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def _quantize_in_chunks(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """The same values by the same operations, through one buffer that stays in the cache: whole
    tensors pass memory five times (0.2 instead of 1.1 billion values a second on 2 cores)."""
    flat = x.reshape(-1)
    result = torch.empty(flat.shape, dtype=E4M3)
    buffer = torch.empty(_CHUNK_VALUES, dtype=torch.float32)
    for start in range(0, len(flat), _CHUNK_VALUES):
        chunk = flat[start : start + _CHUNK_VALUES]
        scaled = buffer[: len(chunk)].copy_(chunk).div_(divisor).clamp_(-E4M3_MAX, E4M3_MAX)
        result[start : start + len(chunk)].copy_(scaled)
    return result.view(x.shape)


def dequantize(stored: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """stored * scale in float32."""
    return stored.to(torch.float32) * scale


def product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x @ weight.T * scale + bias, all in float32.

    x: [..., in_features], weight: [out_features, in_features], both e4m3 or their values widened;
    scale: one float32, the weight's times the input's; bias: [out_features].
    """
    y = nn.functional.linear(x.to(torch.float32), weight.to(torch.float32)) * scale
    return y if bias is None else y + bias.to(torch.float32)


class Fp8(NumberFormat):
    """Weights, the inputs of linears and the KV cache in e4m3, each with one static scale."""

    name = "FP8"
    largest = E4M3_MAX

    scale_shapes = MappingProxyType({WEIGHT_SCALE: (1,), ACTIVATION_SCALE: (1,)})
    scale_from_amax = staticmethod(scale_from_amax)
    quantize = staticmethod(quantize)
    dequantize = staticmethod(dequantize)

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return E4M3

    def cache_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """A CPU holds the same values as bfloat16, which it widens twenty times faster."""
        return torch.bfloat16 if device.type == "cpu" else E4M3

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        assert scales is not None, "FP8 weights need their scales"
        weight_scale, activation_scale = scales
        x = quantize(x, activation_scale)
        return product(x, weight, activation_scale * weight_scale, bias)


FP8 = Fp8()
