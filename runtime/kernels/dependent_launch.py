"""Programmatic dependent launch: a kernel comes onto the GPU while the one before it still runs.

A kernel that is launched with `dependent(...)` may start early. It calls `wait_for_previous` before
it touches anything that another kernel writes. Every kernel so launched calls it in every program,
so all kernels before the previous one are complete too. What comes before the call must need no
other kernel: weights are asked for there. CUDA C++ Programming Guide, "Programmatic Dependent
Launch and Synchronization".
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(ON_GPU: tl.constexpr):
    """Waits until all that the kernels before wrote can be read, then lets the next kernel come."""
    if ON_GPU:
        gdc_wait()
        gdc_launch_dependents()


def dependent(device: torch.device) -> dict[str, Any]:
    """The launch options of a kernel that calls `wait_for_previous`, its ON_GPU among them."""
    is_gpu = device.type == "cuda"
    return {"ON_GPU": is_gpu} | ({"launch_pdl": True} if is_gpu else {})
