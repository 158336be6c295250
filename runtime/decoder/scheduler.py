"""Which requests run in the next step, how many of their tokens, and on which blocks.

Continuous batching (Orca, OSDI 2022) over a paged cache (vLLM, arXiv 2309.06180): before every
step waiting requests join in order of arrival while there is room; finished ones leave at once.
A step takes max_num_tokens: first one of each request that decodes, then of prompts, a long one in
chunks (Sarathi, arXiv 2308.16369), beside rows that decode as many as its time allows
(step_bound.py). A request joins when its prompt's blocks are free and takes more as it grows; where
none is left, the one that came last gives up its blocks and waits in front, to be computed again.
Blocks of a prefix that was computed before are shared (block_allocator.py), but for a prompt whose
log probabilities are wanted: those need all its logits. A step can be scheduled while the tokens of
the one before are still being computed (`schedule_ahead`). Knows token counts and identities, not
their meaning.
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
from runtime.decoder.executor import DecoderCounts, DecoderRequest, TokenLogprobs, WaitCause
from runtime.decoder.guidance import Matcher
from runtime.decoder.step_bound import StepBound

UNKNOWN_TOKEN = -1
"""Stands for a token that is being computed."""

MAX_PROMPT_LOGITS = 256
"""Most tokens of a step from a prompt whose log probabilities are wanted: their logits are 156 MB
at the 72B model's vocabulary."""


def max_num_blocks(limits: EngineLimits) -> int:
    """Every place of the batch has room for max_seq_len."""
    return limits.max_batch_size * num_blocks_for(limits.max_seq_len)


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way.

    Steps in flight count: what they compute is in the cache, though their tokens are unknown.
    """

    request_id: int  # as `submit` returned it
    request: DecoderRequest  # what was asked
    max_num_tokens: int  # of prompt and answer
    token_ids: list[int]  # of prompt and answer, as far as they are known
    # One a prompt token (image_ids.py); empty for text alone.
    image_keys: list[bytes] = field(default_factory=list)
    matcher: Matcher | None = None  # of its guide, if it has one
    num_cached: int = 0  # tokens that are in the cache, or will be after the steps in flight
    num_reused: int = 0  # tokens of its prompt that earlier requests had computed
    num_scheduled: int = 0  # tokens that the next step computes
    blocks: list[int] = field(default_factory=list)  # that it holds, in order
    keys: list[bytes] = field(default_factory=list)  # of its blocks that are full and registered
    has_left: bool = False  # ended or cancelled: its place is free
    changes_logits: bool = False  # a setting does (logits_processors.py)
    same_prompt: Sequence | None = None  # the request whose blocks this one waits for
    # So far, if asked for.
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
        """The most of its own tokens that a step may compute."""
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
    """bound: of the time of steps in which somebody decodes; None is none."""

    def __init__(
        self, limits: EngineLimits, num_blocks: int, bound: StepBound | None = None
    ) -> None:
        self._limits, self._bound = limits, bound
        self._allocator = BlockAllocator(num_blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        self.num_reused_tokens = 0
        self.num_tokens_beside = 0  # of prompts, computed in steps in which somebody decoded
        self.num_tokens_alone = 0  # in all others
        self._waits_for: WaitCause | None = None  # the first that waits, as of the last step

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
    def counts(self) -> DecoderCounts:
        num_waiting, cause = len(self._waiting), self._waits_for
        return DecoderCounts(
            usage=1.0 - self._allocator.num_free / self._allocator.num_blocks,
            num_preemptions=self.num_preemptions,
            num_queried_tokens=self.num_queried_tokens,
            num_reused_tokens=self.num_reused_tokens,
            num_tokens_beside=self.num_tokens_beside,
            num_tokens_alone=self.num_tokens_alone,
            waiting={cause: num_waiting} if cause is not None and num_waiting else {},
        )

    @property
    def is_idle(self) -> bool:
        return not self._running and not self._waiting

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
        self._begin_step()
        num_rows = 0
        for sequence in [each for each in self._running if each.num_uncached == 1]:
            # A sequence that gave way to one before it runs no more.
            has_room = num_rows < self._limits.max_num_tokens and sequence in self._running
            if has_room and self._make_room(sequence):
                sequence.num_scheduled = 1
                num_rows += 1
        return self._with_prompts(num_rows)

    def schedule_ahead(self) -> list[Sequence]:
        """Schedules the step after one whose tokens are unknown yet: all sequences that it does
        not complete, each with that one token, and prompts, whose tokens are known, as any step
        does. Empty where the step has to wait for those tokens: one that waits is sure to find a
        place then, blocks run out, or log probabilities of a prompt are wanted.

        A sequence that turns out to have ended with its token has been scheduled for nothing, and
        writes after its end into a block of its own. Who is given that block later writes later.
        """
        unfinished = [sequence for sequence in self._running if not sequence.is_complete]
        decoding = [each for each in unfinished if each.num_uncached == 1]
        if self._waiting and len(unfinished) < len(self._running):
            return []
        if any(each.wants_prompt_logprobs for each in (*unfinished, *[*self._waiting][:1])):
            return []
        needed = [num_blocks_for(each.num_tokens) - len(each.blocks) for each in decoding]
        if len(decoding) > self._limits.max_num_tokens or sum(needed) > self._allocator.num_free:
            return []
        self._begin_step()
        for sequence, count in zip(decoding, needed, strict=True):
            if count > 0:
                sequence.blocks += self._allocator.allocate(count)
            sequence.num_scheduled = 1
        return self._with_prompts(len(decoding))

    def _begin_step(self) -> None:
        for sequence in self._running:
            sequence.num_scheduled = 0

    def _with_prompts(self, num_rows: int) -> list[Sequence]:
        """Adds chunks of prompts to a step of `num_rows` sequences that decode, first of those that
        run, whose blocks they have, then of those that join. All that the step runs."""
        budget = self._limits.max_num_tokens - num_rows
        if num_rows > 0 and self._bound is not None:
            budget = min(budget, self._bound.most_prompt_tokens(num_rows))
        for sequence in self._running:
            if sequence.num_uncached > 1 and budget > 0:
                budget -= self._take_chunk(sequence, budget)
        self._waits_for = None
        while self._waiting and self._waits_for is None:
            self._waits_for = "step" if budget == 0 else self._join(self._waiting[0])
            if self._waits_for is None:
                sequence = self._waiting.popleft()
                self._running.append(sequence)
                budget -= self._take_chunk(sequence, budget)
        return [sequence for sequence in self._running if sequence.num_scheduled > 0]

    @staticmethod
    def _take_chunk(sequence: Sequence, budget: int) -> int:
        count = min(sequence.num_uncached, sequence.max_num_scheduled, budget)
        sequence.num_scheduled = count
        return count

    def advance(self, sequences: list[Sequence]) -> None:
        """After a step: what was scheduled is cached, and its full blocks can be shared as far as
        their tokens are known."""
        self._count_prompts(sequences)
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

    def _count_prompts(self, sequences: list[Sequence]) -> None:
        counts = [sequence.num_scheduled for sequence in sequences]
        num_tokens = sum(count for count in counts if count > 1)
        if 1 in counts:
            self.num_tokens_beside += num_tokens
        else:
            self.num_tokens_alone += num_tokens

    def _register(self, sequence: Sequence) -> None:
        end = min(sequence.num_cached, sequence.num_known)
        for index in range(len(sequence.keys), end // TOKENS_PER_BLOCK):
            sequence.keys.append(sequence.key_of(index))
            self._allocator.register(sequence.blocks[index], sequence.keys[index])

    def _join(self, sequence: Sequence) -> WaitCause | None:
        """Gives it the blocks of all its tokens, shared as far as its prefix is known; or says what
        it waits for."""
        if len(self._running) == self._limits.max_batch_size:
            return "place"
        first = sequence.same_prompt
        if first is not None and not (first.has_left or first.is_prompt_computed):
            return "equal_prompt"
        sequence.same_prompt = None
        if not sequence.wants_prompt_logprobs:
            self._share_prefix(sequence)
        needed = num_blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if needed > self._allocator.num_free:
            self._release(sequence)
            return "blocks"
        sequence.blocks += self._allocator.allocate(needed)
        if sequence.num_generated == 0:
            sequence.num_reused = sequence.num_cached
        self.num_queried_tokens += sequence.num_tokens
        self.num_reused_tokens += sequence.num_cached
        return None

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

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for one more token, if it needs one, of the last to come if need be; False if it
        is itself the last."""
        needed = num_blocks_for(sequence.num_tokens) - len(sequence.blocks)
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
