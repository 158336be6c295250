"""Which requests run in the next step, and which blocks of the KV cache are theirs.

Continuous batching (Orca, OSDI 2022) over a paged cache (vLLM, arXiv 2309.06180): before every
step waiting requests join in order of arrival while there is room; finished ones leave at once.
A request is admitted when blocks for its longest possible answer are free, so a running request
never lacks one. Knows token counts, not tokens' meaning.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nvlm.limits import EngineLimits
from runtime.decoder.executor import DecoderRequest

TOKENS_PER_BLOCK = 32  # TensorRT-LLM's default


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_BLOCK)


def max_num_blocks(limits: EngineLimits) -> int:
    """Every place of the batch has room for max_seq_len."""
    return limits.max_batch_size * num_blocks_for(limits.max_seq_len)


class BlockAllocator:
    """Free blocks of the paged cache, by number."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        assert count <= len(self._free), f"{count} blocks asked for, {len(self._free)} free"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))
        assert len(self._free) <= self.num_blocks, "a block was released twice"


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way: `num_cached` of its tokens are in the cache, the rest are pending."""

    request_id: int
    request: DecoderRequest
    max_num_tokens: int
    token_ids: list[int]
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def pending(self) -> list[int]:
        return self.token_ids[self.num_cached :]


class Scheduler:
    def __init__(self, limits: EngineLimits, num_blocks: int) -> None:
        self._limits = limits
        self._allocator = BlockAllocator(num_blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_free_blocks(self) -> int:
        return self._allocator.num_free

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        assert num_blocks_for(sequence.max_num_tokens) <= self._allocator.num_blocks
        self._waiting.append(sequence)

    def schedule(self) -> list[Sequence]:
        """The sequences of the next step, those already running first."""
        num_tokens = sum(len(sequence.pending) for sequence in self._running)
        while self._waiting and len(self._running) < self._limits.max_batch_size:
            sequence = self._waiting[0]
            num_blocks = num_blocks_for(sequence.max_num_tokens)
            num_tokens += len(sequence.pending)
            if num_tokens > self._limits.max_num_tokens or num_blocks > self._allocator.num_free:
                break
            sequence.blocks = self._allocator.allocate(num_blocks)
            self._running.append(self._waiting.popleft())
        return list(self._running)

    def finish(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._allocator.release(sequence.blocks)

    def cancel(self, request_id: int) -> None:
        for sequence in self._running:
            if sequence.request_id == request_id:
                self.finish(sequence)
                return
        self._waiting = deque(s for s in self._waiting if s.request_id != request_id)
