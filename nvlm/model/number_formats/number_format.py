"""What every number format of a linear answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WEIGHT_SCALE = "weights_scaling_factor"
ACTIVATION_SCALE = "activation_scaling_factor"
"""TensorRT-LLM's names, after the linear's own."""


def round_up(scale: float, dtype: torch.dtype) -> float:
    """The smallest number of `dtype` that is not below the float32 number `scale` (positive).

    Not to the nearest number: what the scale was made from would then be clipped.
    """
    exact = torch.tensor(scale, dtype=torch.float32)
    rounded = exact.to(dtype)
    if rounded.to(torch.float32) < exact:
        bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        rounded = (rounded.view(bits) + 1).view(dtype)  # the next one, of positive numbers
    return float(rounded)


@dataclass(frozen=True, slots=True)
class LinearScales:
    """A linear's static scales, one of its weight and one of its input: real = stored * scale."""

    weight: float  # of the whole weight
    activation: float  # of the whole input

    def to_json(self) -> dict[str, float]:
        return {WEIGHT_SCALE: self.weight, ACTIVATION_SCALE: self.activation}


class NumberFormat(ABC):
    """How a linear's weight, or the KV cache, is stored, and what a product with it is."""

    name: str
    """`quant_algo` of config.json and of the command line."""

    largest: float
    """The largest magnitude that can be stored, in scales."""

    scale_shapes: Mapping[str, tuple[int, ...]]
    """The float32 tensors beside a weight, by the ends of their names. Ranks that share the weight
    hold all of each."""

    @abstractmethod
    def stored_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a checkpoint in `dtype` stores, and so the bytes of a value."""

    @abstractmethod
    def cache_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """What the KV cache of a checkpoint in `dtype` is held in on `device`."""

    @abstractmethod
    def scale_from_amax(self, amax: float) -> float:
        """The float32 scale of a tensor whose largest magnitude is `amax`."""

    @abstractmethod
    def quantize(self, x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        """x / scale as it is stored, in x's shape."""

    @abstractmethod
    def dequantize(self, stored: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
        """stored * scale in float32."""

    @abstractmethod
    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x @ weight.T + bias by the numerics contract, float32 [..., out_features].

        x: [..., in_features] in any float dtype; weight: [out_features, in_features] as stored,
        or widened to float32; scales: [2] float32, the weight's and the input's, where the format
        has them; bias: [out_features] float32.
        """

    def scales_from_amax(
        self, weight: float, activation: float, dtype: torch.dtype
    ) -> LinearScales:
        """Rounded up to numbers of `dtype`, to which TensorRT-LLM casts both;
        decision 100 (docs/decisions/model.md)."""
        return LinearScales(
            round_up(self.scale_from_amax(weight), dtype),
            round_up(self.scale_from_amax(activation), dtype),
        )

    def scale_tensors(self, linear: str, scales: LinearScales) -> dict[str, torch.Tensor]:
        """What is stored beside the weight of `linear`, by name."""
        values = scales.to_json()
        return {
            f"{linear}.{kind}": torch.full(shape, values[kind])
            for kind, shape in self.scale_shapes.items()
        }

    def read_scales(self, read: Callable[[str], torch.Tensor], linear: str) -> LinearScales | None:
        """What `scale_tensors` stored, or None where the format has no scales."""
        if not self.scale_shapes:
            return None
        weight, activation = (
            float(read(f"{linear}.{kind}")) for kind in (WEIGHT_SCALE, ACTIVATION_SCALE)
        )
        return LinearScales(weight, activation)
