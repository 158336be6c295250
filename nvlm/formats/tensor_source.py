"""Where a loader gets tensors by name: a file, or whatever stands in for one."""

from __future__ import annotations

from typing import Protocol

import torch


class TensorSource(Protocol):
    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, on any device."""
        ...
