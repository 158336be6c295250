"""Whether the kernels for Hopper run on a device: where they are asked for, until a GPU has proved
them."""

from __future__ import annotations

import importlib.util
import os

import torch

SWITCH = "NVLM_HOPPER_KERNELS"
"""Environment variable that asks for them with 1. By default plain PyTorch runs, which is right on
a GPU and slow; the kernels are proved in Triton's interpreter and compiled, not run on a GPU."""

_CAPABILITY = (9, 0)


def has_kernels(device: torch.device) -> bool:
    """Asked for, on a Hopper GPU or later, and with Triton, which comes with torch for CUDA."""
    return (
        os.environ.get(SWITCH) == "1"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= _CAPABILITY
        and importlib.util.find_spec("triton") is not None
    )
