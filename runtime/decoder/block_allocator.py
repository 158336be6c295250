"""The paged cache's blocks by number: free, held by sequences, or kept for a prefix to come again.

A full block is registered under a key that stands for all tokens up to its end. Sequences with that
prefix share it, and after the last of them it is kept until room is needed: the one left longest
ago goes first, of one sequence the last.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

TOKENS_PER_BLOCK = 32  # TensorRT-LLM's default


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_BLOCK)


def block_key(previous: bytes, token_ids: Sequence[int], image_keys: Sequence[bytes]) -> bytes:
    """The key of a full block after the block `previous` (empty: the first).

    image_keys: as image_ids.py makes them.
    """
    digest = hashlib.sha256(previous)
    digest.update(array("Q", token_ids).tobytes())
    for key in image_keys:
        digest.update(len(key).to_bytes(2, "little") + key)
    return digest.digest()


class BlockAllocator:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # registered, held by nobody

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, kept ones included."""
        return len(self._free) + len(self._kept)

    def allocate(self, count: int) -> list[int]:
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            assert self._num_holders[block] > 0, "a block was released twice"
            self._num_holders[block] -= 1
            if self._num_holders[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Makes a full block findable; of two with equal contents the first."""
        assert self._num_holders[block] > 0, "the block is nobody's"
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block], self._block_of[key] = key, block

    def share(self, key: bytes) -> int | None:
        """The block registered under `key`, now held once more."""
        block = self._block_of.get(key)
        if block is not None:
            self._kept.pop(block, None)
            self._num_holders[block] += 1
        return block

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
