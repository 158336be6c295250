"""What the chunks of prompts in a step read, in device memory that stays where it is, so that a
CUDA graph can be replayed: embeddings, positions and slots of their rows, how attention divides
them, and a block table of each chunk's sequence."""

from __future__ import annotations

import torch

from nvlm.planning.hopper import CHUNK_SIZES
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.kernels.operands import ChunkTiles
from runtime.decoder.models.step import SequenceStep

MAX_CHUNKS = 8  # of a step
_TILE_TOKENS = 16  # rows that a program of attention takes, with all heads that share a KV head
_FIELDS = 4  # of a tile


class ChunkInputs:
    """Room for `CHUNK_SIZES[-1]` rows of `MAX_CHUNKS` chunks; a padding row is position 0 on
    `padding_block`."""

    def __init__(
        self,
        max_seq_len: int,
        padding_block: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        most = CHUNK_SIZES[-1]
        self._num_tiles = num_tiles(most)
        self._width = -(-num_blocks_for(max_seq_len) // 4) * 4  # of a table: aligned to 16 bytes
        self._first_table = 2 * most + _FIELDS * self._num_tiles
        size = self._first_table + MAX_CHUNKS * self._width
        is_pinned = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self._is_copied = torch.cuda.Event() if is_pinned else None
        self._padding_slot = padding_block * TOKENS_PER_BLOCK
        self.embeddings = torch.zeros(most, hidden_size, dtype=dtype, device=device)

    def fill(self, steps: list[SequenceStep]) -> None:
        """A chunk a step: at most `MAX_CHUNKS`, of `CHUNK_SIZES[-1]` tokens in all. Their
        `embeddings` are the caller's to write."""
        if self._is_copied is not None:
            self._is_copied.synchronize()  # of the step before, which may be in flight
        host, most = self._host.numpy(), CHUNK_SIZES[-1]
        host[:most] = 0
        host[most : 2 * most] = self._padding_slot
        tiles: list[tuple[int, int, int, int]] = []
        row = 0
        for sequence, step in enumerate(steps):
            first, end, blocks = step.first_position, step.end_position, step.blocks
            count = end - first
            host[row : row + count] = range(first, end)
            host[most + row : most + row + count] = [
                blocks[position // TOKENS_PER_BLOCK] * TOKENS_PER_BLOCK
                + position % TOKENS_PER_BLOCK
                for position in range(first, end)
            ]
            tiles += [
                (row + begin, min(_TILE_TOKENS, count - begin), first + begin, sequence)
                for begin in range(0, count, _TILE_TOKENS)
            ]
            start = self._first_table + sequence * self._width
            host[start : start + len(blocks)] = blocks
            row += count
        flat = host[2 * most : self._first_table].reshape(-1, _FIELDS)
        flat[:] = 0
        if tiles:
            flat[: len(tiles)] = tiles
        used = self._first_table + len(steps) * self._width
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._is_copied is not None:
            self._is_copied.record()

    def positions(self, num_rows: int) -> torch.Tensor:
        return self._device[:num_rows]

    def slots(self, num_rows: int) -> torch.Tensor:
        return self._device[CHUNK_SIZES[-1] :][:num_rows]

    def tiles(self, num_rows: int) -> ChunkTiles:
        flat = self._device[2 * CHUNK_SIZES[-1] : self._first_table]
        return ChunkTiles(flat.view(-1, _FIELDS)[: num_tiles(num_rows)], _TILE_TOKENS)

    @property
    def block_tables(self) -> torch.Tensor:
        """[MAX_CHUNKS, max_blocks] int32; a row is valid as far as its chunk goes."""
        return self._device[self._first_table :].view(MAX_CHUNKS, -1)


def num_tiles(num_rows: int) -> int:
    """Enough for `num_rows` rows, however `MAX_CHUNKS` chunks divide them."""
    return num_rows // _TILE_TOKENS + MAX_CHUNKS
