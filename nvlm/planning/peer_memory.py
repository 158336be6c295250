"""What the GPUs of one machine's ranks map of one another's memory, and how many bytes it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.planning.hopper import CHUNK_SIZES, MAX_GRAPH_ROWS
from nvlm.planning.limits import EngineLimits

MAX_RANKS = 8
MAX_PROGRAMS = 128
"""Programs of a kernel that waits for other ranks. A Hopper GPU has more multiprocessors, so all
programs that wait run at once."""

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in the piece of memory that every rank has."""

    dtype: torch.dtype  # of its values
    shape: tuple[int, ...]  # on each rank
    offset: int  # bytes from the beginning of the piece

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def rows_of_a_rank(num_rows: int, num_ranks: int) -> int:
    """How many of a step's rows a rank owns, the last ones fewer: at least what a product takes."""
    return -(-num_rows // (8 * num_ranks)) * 8


def places(config: CheckpointConfig, limits: EngineLimits) -> dict[str, Place]:
    """parts: two places in turns for a linear's sums; norms: a step's rows in the model's dtype;
    logits: of all ranks, on the leader; tokens: drawn ones, a row each; flags: by which kernels
    wait."""
    num_ranks, decoder = config.tp_size, config.decoder
    # With its padding, a graph has more rows than small limits let a step have.
    num_rows = max(limits.max_num_tokens, MAX_GRAPH_ROWS + CHUNK_SIZES[-1])
    values = num_ranks * rows_of_a_rank(num_rows, num_ranks) * decoder.hidden_size
    vocab_size = config.mapping().padded_vocab_size(decoder.vocab_size)
    found, offset = {}, 0
    for name, dtype, shape in (
        ("parts", torch.float32, (2, values)),
        ("norms", TORCH_DTYPES[config.dtype], (values,)),
        ("logits", torch.float32, (limits.max_batch_size * vocab_size,)),
        ("tokens", torch.int64, (MAX_GRAPH_ROWS,)),
        ("flags", torch.int32, (MAX_PROGRAMS * num_ranks,)),
    ):
        found[name] = Place(dtype, shape, offset)
        offset = -(-found[name].end // _ALIGNMENT) * _ALIGNMENT
    return found


def peer_memory_bytes(config: CheckpointConfig, limits: EngineLimits) -> int:
    """Bytes of memory that every rank maps for the others."""
    return -(-places(config, limits)["flags"].end // _ALIGNMENT) * _ALIGNMENT
