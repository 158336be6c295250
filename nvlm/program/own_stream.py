"""A thread's own stream on a GPU, and the GPU that the thread is on."""

from __future__ import annotations

import torch


def own_stream(device: torch.device | int) -> torch.cuda.Stream:
    """A new stream for the calling thread, which is on this GPU from then on.

    A thread begins on GPU 0, and torch returns there after each block on another GPU's stream. CUDA
    then makes a context on GPU 0, whose memory every other rank's threads would take.
    """
    torch.cuda.set_device(device)
    return torch.cuda.Stream()
