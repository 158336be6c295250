"""Memory that the split kernels share, allocated once so that CUDA graphs may hold its address.

Kernels of one stream run one after another, so one area serves all of them. What runs beside them
has an area of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MAX_CROWD = 4
_MAX_ROWS = 128  # of an attention tile: queries
_ROWS_TIMES_CHANNELS = 64 * 256  # the largest attention tile: queries, channels of a head
_ROWS_TIMES_COLUMNS = 16 * 64  # a tile of gate and up: tokens, output columns
_MAX_TILES = 1 << 16  # tiles of output columns, and pairs of a request and a KV head


@dataclass(frozen=True, slots=True)
class Workspace:
    """What programs of one kernel leave for each other."""

    num_programs: int  # that the device runs at once
    partial_sums: torch.Tensor  # float32: rows of pieces that another program sums
    # Float32: of each piece and row the largest value and the total of the softmax.
    stats: torch.Tensor
    counters: torch.Tensor  # zero between launches: whoever comes last at one sets it back

    @classmethod
    def allocate(cls, device: torch.device, num_programs: int) -> Workspace:
        """num_programs: how many run at once, a small multiple of the multiprocessors."""
        places = _MAX_CROWD * num_programs
        values = max(2 * num_programs * _ROWS_TIMES_COLUMNS, places * _ROWS_TIMES_CHANNELS)
        return cls(
            num_programs,
            torch.empty(values, dtype=torch.float32, device=device),
            torch.empty(places * 2 * _MAX_ROWS, dtype=torch.float32, device=device),
            torch.zeros(_MAX_TILES, dtype=torch.int32, device=device),
        )

    @property
    def num_places(self) -> int:
        """How many pieces of an attention tile fit."""
        return _MAX_CROWD * self.num_programs

    def num_splits(self, num_tasks: int, crowd: int, max_splits: int) -> int:
        """How many pieces of a context run beside each other, so that every program has one.
        crowd: programs of attention in the place of one of `num_programs`, at most 4. max_splits:
        what one program merges. A power of 2: each number is a kernel of its own, and these the
        CUDA graphs' sizes compile."""
        splits = min(max_splits, crowd * self.num_programs // num_tasks)
        return 1 << max(0, splits.bit_length() - 1)
