"""What the chunks of prompts in a step read: positions and slots of their rows, how attention
divides them, and the pages of their contexts. For a CUDA graph it is in device memory that stays
where it is, with the rows' embeddings."""

from __future__ import annotations

import torch

from nvlm.planning.hopper import CONTEXT_STEP, MAX_CHUNKS
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK, num_blocks_for
from runtime.decoder.kernels.operands import ChunkTiles, Contexts
from runtime.decoder.models.step import SequenceStep, positions_of, slots_of

_TILE_FIELDS, _PAGE_FIELDS = 4, 2
_ALIGNED = 4  # numbers of 4 bytes: Triton compiles anew for a tensor that begins elsewhere


def context_positions(step: SequenceStep) -> int:
    """How many positions the step's context takes in memory."""
    return -(-step.end_position // CONTEXT_STEP) * CONTEXT_STEP


def tiles_of(steps: list[SequenceStep], num_tokens: int) -> torch.Tensor:
    """`ChunkTiles.rows` of the steps' rows in order, at most num_tokens each, on the host."""
    tiles: list[tuple[int, int, int, int]] = []
    row = place = 0
    for step in steps:
        count = len(step.token_ids)
        tiles += [
            (row + begin, min(num_tokens, count - begin), step.first_position + begin, place)
            for begin in range(0, count, num_tokens)
        ]
        row += count
        place += context_positions(step)
    return torch.tensor(tiles, dtype=torch.int32).view(-1, _TILE_FIELDS)


def pages_of(steps: list[SequenceStep]) -> torch.Tensor:
    """`Contexts.pages` of the steps' contexts in order, on the host."""
    pages: list[tuple[int, int]] = []
    for step in steps:
        length = step.end_position
        num_blocks = num_blocks_for(length)
        pages += [
            (block, min(TOKENS_PER_BLOCK, length - i * TOKENS_PER_BLOCK))
            for i, block in enumerate(step.blocks[:num_blocks])
        ]
        pages += [(0, 0)] * (context_positions(step) // TOKENS_PER_BLOCK - num_blocks)
    return torch.tensor(pages, dtype=torch.int32).view(-1, _PAGE_FIELDS)


class ChunkInputs:
    """Room for `max_rows` rows of `MAX_CHUNKS` chunks, whose contexts fit k and v; a padding row is
    position 0 on `padding_block`.

    tile_tokens: the most rows of a tile. k and v: [kv_heads, positions, channels], as `Contexts`
    has them.
    """

    def __init__(
        self,
        max_rows: int,
        padding_block: int,
        tile_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        self._tile_tokens, self._padding_slot = tile_tokens, padding_block * TOKENS_PER_BLOCK
        self._k, self._v, device = k, v, k.device
        self._parts = (
            max_rows,
            max_rows,
            _TILE_FIELDS * self._num_tiles(max_rows),
            _ALIGNED,
            _PAGE_FIELDS * (k.shape[1] // TOKENS_PER_BLOCK),
        )
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
        positions, slots, tiles, num_pages, pages = self._host.split(self._parts)
        positions.zero_()
        slots.fill_(self._padding_slot)
        tiles.zero_()
        num_pages.zero_()
        if steps:
            found = positions_of(steps)
            positions[: len(found)] = found
            slots[: len(found)] = slots_of(steps)
            rows, own = tiles_of(steps, self._tile_tokens), pages_of(steps)
            tiles[: rows.numel()] = rows.flatten()
            num_pages[0] = len(own)
            pages[: own.numel()] = own.flatten()
        self._device.copy_(self._host, non_blocking=True)
        if self._is_copied is not None:
            self._is_copied.record()

    def fits(self, steps: list[SequenceStep]) -> bool:
        """Whether there is memory for the chunks and their contexts."""
        num_positions = sum(context_positions(step) for step in steps)
        return len(steps) <= MAX_CHUNKS and num_positions <= self._k.shape[1]

    def positions(self, num_rows: int) -> torch.Tensor:
        return self._device.split(self._parts)[0][:num_rows]

    def slots(self, num_rows: int) -> torch.Tensor:
        return self._device.split(self._parts)[1][:num_rows]

    def tiles(self, num_rows: int) -> ChunkTiles:
        rows = self._device.split(self._parts)[2].view(-1, _TILE_FIELDS)
        return ChunkTiles(rows[: self._num_tiles(num_rows)], self._tile_tokens)

    @property
    def contexts(self) -> Contexts:
        _, _, _, num_pages, pages = self._device.split(self._parts)
        return Contexts(pages.view(-1, _PAGE_FIELDS), num_pages[:1], self._k, self._v)

    def _num_tiles(self, num_rows: int) -> int:
        """Enough for `num_rows` rows, however `MAX_CHUNKS` chunks divide them."""
        return num_rows // self._tile_tokens + MAX_CHUNKS
