"""A decoder layer's published tensors as they are needed: cast, stacked, measured on a device."""

from __future__ import annotations

import torch

from build.conversion.quantization.cast import cast, cast_amax
from build.sources.source import Read
from nvlm.formats.tensor_names import ENGINE_LAYER_TENSORS, EngineTensor


class LayerTensors:
    """Reads in the order of the table, each when it or a later one is first asked for."""

    def __init__(self, prefix: str, read: Read, dtype: torch.dtype, device: torch.device) -> None:
        self.prefix = prefix
        self._read = read
        self._dtype = dtype
        self._device = device
        sources = [source for tensor in ENGINE_LAYER_TENSORS for source in tensor.sources]
        self._to_read = iter(sources)
        self._parts: dict[str, torch.Tensor] = {}

    def _part(self, source: str) -> torch.Tensor:
        while source not in self._parts:
            following = next(self._to_read)
            self._parts[following] = self._read(self.prefix + following)
        return self._parts[source]

    def pop(self, source: str) -> torch.Tensor:
        """The tensor as published, or on a GPU as `whole` cast it; it is then forgotten."""
        self._part(source)
        return self._parts.pop(source)

    def amax(self, tensor: EngineTensor) -> float:
        """The largest magnitude in `dtype`; every value is checked."""
        return max(
            cast_amax(self.prefix + source, self._part(source), self._dtype, self._device)
            for source in tensor.sources
        )

    def whole(self, tensor: EngineTensor) -> torch.Tensor:
        """All of an engine tensor in `dtype` on the device; every value is checked.

        Its parts stay on a GPU until they are popped, so that a layer is copied there once.
        """
        parts = [
            cast(self.prefix + source, self._part(source).to(self._device), self._dtype)
            for source in tensor.sources
        ]
        result = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self._device.type != "cpu":
            counts = [len(part) for part in parts]
            self._parts |= zip(tensor.sources, result.split(counts), strict=True)
        return result
