"""How much memory a device has."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def total_memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this machine (less if its control group allows less)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total
