"""What a decode step reads, in device memory that stays where it is, so that a CUDA graph can be
replayed: token, position and slot of each row, and its block table."""

from __future__ import annotations

import numpy as np
import torch

from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.models.host_copy import to_device
from runtime.decoder.models.step import SequenceStep

# The first columns, and how many. Positions come first: those of one row are not copied, and a
# tensor that does not begin at 16 bytes would have Triton compile its kernel anew.
_POSITION, _TOKEN, _SLOT, _NUM_HEADS = 0, 1, 2, 3
_TABLE = 4  # where tables begin: a multiple of 16 bytes


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
        self._is_copied = torch.cuda.Event() if is_pinned else None
        # Whose blocks a row holds, and how many: a sequence's list only ever grows.
        self._blocks_of: list[tuple[list[int] | None, int]] = [(None, 0)] * max_rows
        self._padding = np.zeros(width, np.int32)
        self._padding[_SLOT] = padding_block * TOKENS_PER_BLOCK
        self._padding[_TABLE:] = padding_block

    def fill(
        self, steps: list[SequenceStep], num_rows: int, drawn_ids: torch.Tensor | None = None
    ) -> None:
        """Each step's one token; `num_rows` - len(steps) rows of padding after them. drawn_ids:
        [n] int64 on the device, the tokens of the n steps that the host does not know."""
        if self._is_copied is not None:
            self._is_copied.synchronize()  # of the step before, which may be in flight
        heads = []
        for i, step in enumerate(steps):
            position, blocks = step.first_position, step.blocks
            place = blocks[position // TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK
            heads.append((position, step.token_ids[0], place + position % TOKENS_PER_BLOCK))
            held, count = self._blocks_of[i]
            if held is not blocks or count != len(blocks):
                self._rows[i, _TABLE : _TABLE + len(blocks)] = blocks
                self._blocks_of[i] = blocks, len(blocks)
        if heads:
            self._rows[: len(heads), :_NUM_HEADS] = heads
        for i in range(len(steps), num_rows):
            self._blocks_of[i] = None, 0
        self._rows[len(steps) : num_rows] = self._padding
        self._device[:num_rows].copy_(self._host[:num_rows], non_blocking=True)
        if self._is_copied is not None:
            self._is_copied.record()
        if drawn_ids is not None:
            self._take_drawn(steps, drawn_ids)

    def _take_drawn(self, steps: list[SequenceStep], drawn_ids: torch.Tensor) -> None:
        rows = [row for row, step in enumerate(steps) if step.is_unknown]
        token_ids = self.token_ids(len(steps))
        if len(rows) == len(steps):
            token_ids.copy_(drawn_ids)
        elif rows:
            places = to_device(torch.tensor(rows), token_ids.device)
            token_ids[places] = drawn_ids.to(token_ids.dtype)

    def token_ids(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows, _TOKEN]

    def positions(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows, _POSITION]

    def slots(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows, _SLOT]

    def block_tables(self, num_rows: int) -> torch.Tensor:
        """[num_rows, max_blocks]; a row is valid as far as its length goes."""
        return self._device[:num_rows, _TABLE:]
