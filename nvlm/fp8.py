"""FP8 E4M3 with one static scale per tensor: real = stored * scale.

E4M3 as in "FP8 Formats for Deep Learning" (arXiv 2209.05433, table 1): largest magnitude 448, no
infinity. Scales follow TensorRT-LLM: amax / 448, for weights, activations and the KV cache.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


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
    scaled = x.to(torch.float32) / divisor
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def dequantize(q: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """q * scale in float32."""
    return q.to(torch.float32) * scale
