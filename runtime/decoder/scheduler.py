"""Which requests run in the next step, how many of their tokens, and on which blocks.

Continuous batching (Orca, OSDI 2022) over a paged cache (vLLM, arXiv 2309.06180): before every
step waiting requests join in order of arrival while there is room; finished ones leave at once.
A step takes max_num_tokens: first one of each request that decodes, then of prompts, a long one in
chunks (Sarathi, arXiv 2308.16369). A request joins when its prompt's blocks are free and takes more
as it grows; where none is left, the one that came last gives up its blocks and waits in front,
to be computed again. Blocks of a prefix that was computed before are shared (block_allocator.py),
but for a prompt whose log probabilities are wanted: those need all its logits.
Where only decoding goes on, a step can be scheduled while the tokens of the one before are still
being computed (`schedule_ahead`). Knows token counts and identities, not their meaning.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nvlm.planning.limits import EngineLimits
from runtime.decoder.block_allocator import (
    TOKENS_PER_BLOCK,
    BlockAllocator,
    block_key,
    num_blocks_for,
)
from runtime.decoder.executor import DecoderRequest, TokenLogprobs
from runtime.decoder.guidance import Matcher

UNKNOWN_TOKEN = -1
"""In the place of a token that is being computed."""

MAX_PROMPT_LOGITS = 256
"""Of a prompt whose log probabilities are wanted, so many tokens in a step: their logits are 156 MB
at the 72B model's vocabulary."""


def max_num_blocks(limits: EngineLimits) -> int:
    """Every place of the batch has room for max_seq_len."""
    return limits.max_batch_size * num_blocks_for(limits.max_seq_len)


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way: `num_cached` of its tokens are in the cache, or will be after the steps
    that are under way, whose tokens are unknown; the next step computes `num_scheduled` more.
    image_keys: one a prompt token (image_ids.py), none for text alone. `keys` are those of its
    blocks that are full and registered. matcher: of its guide, if it has one."""

    request_id: int
    request: DecoderRequest
    max_num_tokens: int
    token_ids: list[int]
    image_keys: list[bytes] = field(default_factory=list)
    matcher: Matcher | None = None
    num_cached: int = 0
    num_scheduled: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    has_left: bool = False
    changes_logits: bool = False  # a setting does (logits_processors.py)
    same_prompt: Sequence | None = None  # the request whose blocks this one waits for
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncached(self) -> int:
        return self.num_tokens - self.num_cached

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_known(self) -> int:
        """How many of its tokens are known: all but the last one or two."""
        count = self.num_tokens
        while self.token_ids[count - 1] == UNKNOWN_TOKEN:
            count -= 1
        return count

    @property
    def is_complete(self) -> bool:
        """Whether it ends with its last token, whatever that is."""
        return self.num_tokens == self.max_num_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether those are still to come: then it computes its whole prompt itself."""
        return self.request.sampling.prompt_logprobs is not None and self.num_generated == 0

    @property
    def max_num_scheduled(self) -> int:
        """Of its own tokens in a step."""
        return MAX_PROMPT_LOGITS if self.wants_prompt_logprobs else self.max_num_tokens

    @property
    def num_logits(self) -> int:
        """How many of the tokens of the next step give logits, the last ones."""
        if self.wants_prompt_logprobs:
            return self.num_scheduled
        return int(self.is_last_chunk)

    @property
    def is_prompt_computed(self) -> bool:
        return self.num_cached >= self.num_prompt_tokens

    @property
    def pending(self) -> list[int]:
        """The tokens of the next step."""
        return self.token_ids[self.num_cached : self.num_cached + self.num_scheduled]

    @property
    def is_last_chunk(self) -> bool:
        """Whether the step gives a new token."""
        return self.num_scheduled == self.num_uncached

    def key_of(self, index: int) -> bytes:
        """The key of its full block `index`, whose predecessors have theirs in `keys`."""
        part = slice(index * TOKENS_PER_BLOCK, (index + 1) * TOKENS_PER_BLOCK)
        image_keys = self.image_keys[part]
        image_keys += [b""] * (TOKENS_PER_BLOCK - len(image_keys))
        return block_key(self.keys[index - 1] if index else b"", self.token_ids[part], image_keys)


class Scheduler:
    def __init__(self, limits: EngineLimits, num_blocks: int) -> None:
        self._limits = limits
        self._allocator = BlockAllocator(num_blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0
        self.num_reused_tokens = 0

    def find(self, request_id: int) -> Sequence | None:
        """A sequence that waits or runs."""
        for sequence in (*self._running, *self._waiting):
            if sequence.request_id == request_id:
                return sequence
        return None

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
        """The sequences of the next step, in order of arrival. All their tokens are known."""
        assert all(sequence.num_known == sequence.num_tokens for sequence in self._running)
        budget = self._limits.max_num_tokens
        for sequence in self._running:
            sequence.num_scheduled = 0
        for sequence in sorted(self._running, key=lambda item: item.num_uncached > 1):
            count = min(sequence.num_uncached, sequence.max_num_scheduled, budget)
            # A sequence that gave way to one before it runs no more.
            if sequence in self._running and count > 0 and self._make_room(sequence, count):
                sequence.num_scheduled = count
                budget -= count
        while self._waiting and budget > 0 and self._join(self._waiting[0]):
            sequence = self._waiting.popleft()
            sequence.num_scheduled = min(sequence.num_uncached, sequence.max_num_scheduled, budget)
            self._running.append(sequence)
            budget -= sequence.num_scheduled
        return [sequence for sequence in self._running if sequence.num_scheduled > 0]

    def schedule_ahead(self) -> list[Sequence]:
        """Schedules the step after one whose tokens are unknown yet: all sequences that it does
        not complete, each with that one token. None where somebody could join then, a prompt goes
        on, or blocks run out: what comes next has to wait for those tokens.

        A sequence that turns out to have ended with its token has been scheduled for nothing, and
        writes behind its end into a block of its own. Who is given that block later writes later.
        """
        going_on = [sequence for sequence in self._running if not sequence.is_complete]
        limits, free = self._limits, self._allocator.num_free
        num_places = min(limits.max_batch_size, limits.max_num_tokens)
        if len(going_on) > num_places or (self._waiting and len(going_on) < num_places):
            return []
        if any(not each.num_known == each.num_cached == each.num_tokens - 1 for each in going_on):
            return []
        needed = [num_blocks_for(each.num_tokens) - len(each.blocks) for each in going_on]
        if sum(needed) > free:
            return []
        for sequence, count in zip(going_on, needed, strict=True):
            if count > 0:
                sequence.blocks += self._allocator.allocate(count)
            sequence.num_scheduled = 1
        return going_on

    def advance(self, sequences: list[Sequence]) -> None:
        """After a step: what was scheduled is cached, and its full blocks can be shared as far as
        their tokens are known."""
        for sequence in sequences:
            sequence.num_cached += sequence.num_scheduled
            sequence.num_scheduled = 0
            self._register(sequence)

    def finish(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._register(sequence)
        self._release(sequence)
        sequence.has_left = True

    def cancel(self, request_id: int) -> None:
        for sequence in self._running:
            if sequence.request_id == request_id:
                self.finish(sequence)
                return
        for sequence in self._waiting:
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
                sequence.has_left = True
                return

    def _register(self, sequence: Sequence) -> None:
        end = min(sequence.num_cached, sequence.num_known)
        for index in range(len(sequence.keys), end // TOKENS_PER_BLOCK):
            sequence.keys.append(sequence.key_of(index))
            self._allocator.register(sequence.blocks[index], sequence.keys[index])

    def _join(self, sequence: Sequence) -> bool:
        """Gives it the blocks of all its tokens, shared as far as its prefix is known."""
        if len(self._running) == self._limits.max_batch_size:
            return False
        first = sequence.same_prompt
        if first is not None and not (first.has_left or first.is_prompt_computed):
            return False
        sequence.same_prompt = None
        if not sequence.wants_prompt_logprobs:
            self._share_prefix(sequence)
        needed = num_blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if needed > self._allocator.num_free:
            self._release(sequence)
            return False
        sequence.blocks += self._allocator.allocate(needed)
        self.num_reused_tokens += sequence.num_cached
        return True

    def _share_prefix(self, sequence: Sequence) -> None:
        """All full blocks but those of the last token, whose logits have to be computed."""
        for index in range((sequence.num_tokens - 1) // TOKENS_PER_BLOCK):
            key = sequence.key_of(index)
            block = self._allocator.share(key)
            if block is None:
                break
            sequence.blocks.append(block)
            sequence.keys.append(key)
        sequence.num_cached = len(sequence.blocks) * TOKENS_PER_BLOCK

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Blocks for `count` more tokens, those of the last to come if need be; False if it is
        itself the last."""
        needed = num_blocks_for(sequence.num_cached + count) - len(sequence.blocks)
        while needed > self._allocator.num_free:
            last = self._running.pop()
            self._release(last)
            self._waiting.appendleft(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
        if needed > 0:
            sequence.blocks += self._allocator.allocate(needed)
        return True

    def _release(self, sequence: Sequence) -> None:
        self._allocator.release(sequence.blocks)
        sequence.blocks, sequence.keys = [], []
        sequence.num_cached = sequence.num_scheduled = 0
