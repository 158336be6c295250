"""What a model of the decoder is asked in one step: token rows, their positions, their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.scheduler import UNKNOWN_TOKEN, Sequence


@dataclass(slots=True)
class SequenceStep:
    """What a step computes of one sequence."""

    # run at positions first_position, ...
    token_ids: list[int]
    first_position: int  # tokens of it that are in the cache
    blocks: list[int]  # of the KV cache, in order
    # None: the tokens are not the prompt's, which alone holds virtual tokens.
    prompt_table: torch.Tensor | None
    num_logits: int  # of so many tokens, the last

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceStep:
        is_prompt = sequence.num_cached < sequence.num_prompt_tokens
        table = sequence.request.prompt_table if is_prompt else None
        return cls(
            sequence.pending,
            sequence.num_cached,
            sequence.blocks,
            table,
            sequence.num_logits,
        )

    @property
    def is_unknown(self) -> bool:
        """Whether its token is still being computed."""
        return self.token_ids == [UNKNOWN_TOKEN]

    @property
    def end_position(self) -> int:
        return self.first_position + len(self.token_ids)


def logit_rows(steps: list[SequenceStep]) -> torch.Tensor:
    """Which of the steps' tokens, one after the other, give logits: [n] int64."""
    rows: list[int] = []
    end = 0
    for step in steps:
        end += len(step.token_ids)
        rows += range(end - step.num_logits, end)
    return torch.tensor(rows, dtype=torch.int64)


def positions_of(steps: list[SequenceStep]) -> torch.Tensor:
    """The positions of all tokens, one step after the other: [T] int64 on the host."""
    return torch.cat([torch.arange(step.first_position, step.end_position) for step in steps])


def slots_of(steps: list[SequenceStep]) -> torch.Tensor:
    """Where their keys and values stand, block * TOKENS_PER_BLOCK and the place in the block: [T]
    int64 on the host."""
    slots = []
    for step in steps:
        positions = torch.arange(step.first_position, step.end_position)
        blocks = torch.tensor(step.blocks)[positions // TOKENS_PER_BLOCK]
        slots.append(blocks * TOKENS_PER_BLOCK + positions % TOKENS_PER_BLOCK)
    return torch.cat(slots)


class DecoderModel(Protocol):
    """Weights and KV cache on one device. Knows neither requests nor sampling."""

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        """Runs every sequence's tokens; float32 logits [those that are wanted, vocab_size], valid
        until the next call. On a rank of several: the columns of its part of the vocabulary."""
        ...

    def close(self) -> None:
        """Nothing comes after it."""
        ...


@runtime_checkable
class AheadModel(DecoderModel, Protocol):
    """A model that is asked for a step before the host knows the tokens of the one before."""

    @property
    def max_rows_ahead(self) -> int: ...

    def forward_ahead(self, steps: list[SequenceStep], token_ids: torch.Tensor) -> torch.Tensor:
        """As `forward`, where up to `max_rows_ahead` steps have a token that the host does not know
        (`is_unknown`). token_ids: [number of these] int64 on the device, theirs in order."""
        ...
