"""Whether the torch executors take their fast path, the kernels for Hopper, on a device."""

from __future__ import annotations

import importlib.util

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.number_formats import FP8, UNQUANTIZED

_CAPABILITY = (9, 0)

MAX_GRAPH_ROWS = 256
"""Rows of the largest decode step that is a CUDA graph; larger batches run without one."""

CHUNK_SIZES = (*range(64, 257, 32),)
"""Rows of chunks of prompts, padding among them, of the steps with prompts that are CUDA graphs.
Launching the kernels of a 72B model one by one takes as long as 300 rows do."""

MAX_CHUNKS = 8
"""Chunks of prompts in such a step."""

CONTEXT_STEP = 64
"""Positions that attention of chunks reads at once: a context in its memory is a multiple."""

_MIN_CONTEXT_POSITIONS = 8192  # a step full of short prompts, by default


def num_context_positions(max_seq_len: int) -> int:
    """How many positions the contexts of a step's chunks are gathered into at once: any one of
    them fits."""
    return max(_MIN_CONTEXT_POSITIONS, _whole_steps(max_seq_len)) + MAX_CHUNKS * CONTEXT_STEP


def _whole_steps(num_positions: int) -> int:
    return -(-num_positions // CONTEXT_STEP) * CONTEXT_STEP


def has_kernels(device: torch.device) -> bool:
    """A Hopper GPU or later, with Triton, which comes with torch for CUDA."""
    return (
        device.type == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= _CAPABILITY
        and importlib.util.find_spec("triton") is not None
    )


def takes_fast_path(config: CheckpointConfig, device: torch.device) -> bool:
    """Whether the decoder runs by the kernels: an FP8 checkpoint of which no linear is excluded,
    with a cache in FP8 or in its dtype."""
    is_fp8 = config.weight_format is FP8 and config.kv_cache_format in (FP8, UNQUANTIZED)
    return (
        is_fp8 and not config.exclude_modules and config.dtype != "float32" and has_kernels(device)
    )
