"""What a decode step reads, in device memory that stays where it is, so that a CUDA graph can be
replayed: token, position and slot of each row, and its block table."""

from __future__ import annotations

import numpy as np
import torch

from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.step import SequenceStep

_TOKEN, _POSITION, _SLOT, _TABLE = 0, 1, 2, 4  # columns; tables begin at a multiple of 16 bytes


class DecodeInputs:
    """Room for `max_rows` rows; a padding row is token 0 alone on `padding_block`."""

    def __init__(
        self, max_rows: int, max_seq_len: int, padding_block: int, device: torch.device
    ) -> None:
        width = _TABLE + -(-num_blocks_for(max_seq_len) // 4) * 4
        is_pinned = device.type == "cuda"
        self._host = torch.zeros(max_rows, width, dtype=torch.int32, pin_memory=is_pinned)
        self._rows = self._host.numpy()
        self._device = torch.zeros(max_rows, width, dtype=torch.int32, device=device)
        self._padding = np.zeros(width, np.int32)
        self._padding[_SLOT] = padding_block * TOKENS_PER_BLOCK
        self._padding[_TABLE:] = padding_block

    def fill(self, steps: list[SequenceStep], num_rows: int) -> None:
        """Each step's one token; `num_rows` - len(steps) rows of padding behind them."""
        for row, step in zip(self._rows, steps, strict=False):
            position = step.first_position
            block = step.blocks[position // TOKENS_PER_BLOCK]
            row[_TOKEN] = step.token_ids[0]
            row[_POSITION] = position
            row[_SLOT] = block * TOKENS_PER_BLOCK + position % TOKENS_PER_BLOCK
            row[_TABLE : _TABLE + len(step.blocks)] = step.blocks
        self._rows[len(steps) : num_rows] = self._padding
        self._device[:num_rows].copy_(self._host[:num_rows], non_blocking=True)

    def token_ids(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows, _TOKEN]

    def positions(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows, _POSITION]

    def slots(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows, _SLOT]

    def block_tables(self, num_rows: int) -> torch.Tensor:
        """[num_rows, max_blocks]; a row is valid as far as its length goes."""
        return self._device[:num_rows, _TABLE:]
