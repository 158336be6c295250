"""Copies what a step reads from host to device, without waiting for the step in flight."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """values: on the host. A copy from memory that is not pinned may wait for what was launched
    before it."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
