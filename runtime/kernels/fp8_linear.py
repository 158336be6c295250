"""A linear as the FP8 kernels take it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """Static scales are float32 tensors without dimensions, on the weight's device."""

    weight: torch.Tensor  # [out_features, in_features] e4m3
    activation_scale: torch.Tensor  # what the input is quantised with
    scale: torch.Tensor  # multiplies the sums: the input's scale times the weight's
    bias: torch.Tensor | None = None  # [out_features]
