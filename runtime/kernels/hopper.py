"""Whether the kernels for Hopper run on a device."""

from __future__ import annotations

import importlib.util

import torch

_CAPABILITY = (9, 0)


def has_kernels(device: torch.device) -> bool:
    """A Hopper GPU or later, with Triton, which comes with torch for CUDA."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _CAPABILITY
        and importlib.util.find_spec("triton") is not None
    )
