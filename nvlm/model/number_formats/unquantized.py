"""No number format of its own: weights in the checkpoint's dtype, products in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats.number_format import NumberFormat


class Unquantized(NumberFormat):
    name = "none"
    largest = math.inf

    scale_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})

    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        assert dtype in TORCH_DTYPES.values(), f"{dtype} needs a number format with scales"
        return dtype

    def cache_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return dtype

    def scale_from_amax(self, amax: float) -> float:
        return 1.0

    def quantize(self, x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        return x

    def dequantize(self, stored: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        return stored.to(torch.float32)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return nn.functional.linear(x.to(torch.float32), weight.to(torch.float32), bias)


UNQUANTIZED = Unquantized()
