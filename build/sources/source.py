"""What the converter asks of a source of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from nvlm.model.config import NVLMConfig

Read = Callable[[str], torch.Tensor]
"""Gives a tensor by its published name, as `WeightSource.read` does."""


class WeightSource(Protocol):
    """Random access by published name. Nothing read is kept: one tensor resident at a time.

    The converter reads ahead from a thread of its own, one tensor at a time, in the order of the
    model's layers.
    """

    config: NVLMConfig
    tokenizer_dir: Path

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored (any float type), possibly a view of a memory-mapped file."""
        ...

    def provenance(self) -> dict[str, Any]:
        """What the manifest says about where the weights came from."""
        ...
