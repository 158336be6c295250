"""What the chunks of prompts in a step read: positions and slots of their rows, how attention
divides them, and a block table of each chunk's sequence. For a CUDA graph it is in device memory
that stays where it is, with the rows' embeddings."""

from __future__ import annotations

import torch

from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.kernels.operands import ChunkTiles
from runtime.decoder.models.step import SequenceStep, positions_of, slots_of

MAX_CHUNKS = 8  # of a step that has a graph
_FIELDS = 4  # of a tile


def tiles_of(steps: list[SequenceStep], num_tokens: int) -> torch.Tensor:
    """`ChunkTiles.rows` of the steps' rows in order, at most num_tokens each, on the host."""
    tiles: list[tuple[int, int, int, int]] = []
    row = 0
    for sequence, step in enumerate(steps):
        count = len(step.token_ids)
        tiles += [
            (row + begin, min(num_tokens, count - begin), step.first_position + begin, sequence)
            for begin in range(0, count, num_tokens)
        ]
        row += count
    return torch.tensor(tiles, dtype=torch.int32).view(-1, _FIELDS)


def tables_of(steps: list[SequenceStep]) -> torch.Tensor:
    """[chunks, most blocks of one] int32 on the host, 0 after a sequence's own."""
    tables = torch.zeros(len(steps), max(len(step.blocks) for step in steps), dtype=torch.int32)
    for table, step in zip(tables, steps, strict=True):
        table[: len(step.blocks)] = torch.tensor(step.blocks)
    return tables


class ChunkInputs:
    """Room for `max_rows` rows of `MAX_CHUNKS` chunks; a padding row is position 0 on
    `padding_block`. tile_tokens: the most rows of a tile."""

    def __init__(
        self,
        max_rows: int,
        max_seq_len: int,
        padding_block: int,
        tile_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._tile_tokens, self._padding_slot = tile_tokens, padding_block * TOKENS_PER_BLOCK
        width = -(-num_blocks_for(max_seq_len) // 4) * 4  # of a table: aligned to 16 bytes
        self._parts = (max_rows, max_rows, _FIELDS * self._num_tiles(max_rows), MAX_CHUNKS * width)
        is_pinned = device.type == "cuda"
        self._host = torch.zeros(sum(self._parts), dtype=torch.int32, pin_memory=is_pinned)
        self._device = torch.zeros(sum(self._parts), dtype=torch.int32, device=device)
        self._is_copied = torch.cuda.Event() if is_pinned else None
        self.embeddings = torch.zeros(max_rows, hidden_size, dtype=dtype, device=device)

    def fill(self, steps: list[SequenceStep]) -> None:
        """A chunk a step: at most `MAX_CHUNKS`, of `max_rows` tokens in all. Their `embeddings` are
        the caller's to write."""
        if self._is_copied is not None:
            self._is_copied.synchronize()  # of the step before, which may be in flight
        positions, slots, tiles, tables = self._host.split(self._parts)
        positions.zero_()
        slots.fill_(self._padding_slot)
        tiles.zero_()
        if steps:
            found = positions_of(steps)
            positions[: len(found)] = found
            slots[: len(found)] = slots_of(steps)
            rows = tiles_of(steps, self._tile_tokens)
            tiles[: rows.numel()] = rows.flatten()
            own = tables_of(steps)
            tables.view(MAX_CHUNKS, -1)[: len(own), : own.shape[1]] = own
        self._device.copy_(self._host, non_blocking=True)
        if self._is_copied is not None:
            self._is_copied.record()

    def positions(self, num_rows: int) -> torch.Tensor:
        return self._device.split(self._parts)[0][:num_rows]

    def slots(self, num_rows: int) -> torch.Tensor:
        return self._device.split(self._parts)[1][:num_rows]

    def tiles(self, num_rows: int) -> ChunkTiles:
        rows = self._device.split(self._parts)[2].view(-1, _FIELDS)
        return ChunkTiles(rows[: self._num_tiles(num_rows)], self._tile_tokens)

    @property
    def block_tables(self) -> torch.Tensor:
        """[MAX_CHUNKS, max_blocks] int32; a row is valid as far as its chunk goes."""
        return self._device.split(self._parts)[3].view(MAX_CHUNKS, -1)

    def _num_tiles(self, num_rows: int) -> int:
        """Enough for `num_rows` rows, however `MAX_CHUNKS` chunks divide them."""
        return num_rows // self._tile_tokens + MAX_CHUNKS
