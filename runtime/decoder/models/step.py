"""What a model of the decoder is asked in one step: token rows, their positions, their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from runtime.decoder.scheduler import Sequence


@dataclass(slots=True)
class SequenceStep:
    """`token_ids` run at positions first_position, ...; `prompt_table` only while they are the
    prompt's, for only the prompt holds virtual tokens. wants_logits: of the last token."""

    token_ids: list[int]
    first_position: int
    blocks: list[int]
    prompt_table: torch.Tensor | None
    wants_logits: bool

    @classmethod
    def of(cls, sequence: Sequence) -> SequenceStep:
        is_prompt = sequence.num_cached < sequence.num_prompt_tokens
        table = sequence.request.prompt_table if is_prompt else None
        return cls(
            sequence.pending,
            sequence.num_cached,
            sequence.blocks,
            table,
            sequence.is_last_chunk,
        )

    @property
    def end_position(self) -> int:
        return self.first_position + len(self.token_ids)


class DecoderModel(Protocol):
    """Weights and KV cache on one device. Knows neither requests nor sampling."""

    def forward(self, steps: list[SequenceStep]) -> torch.Tensor:
        """Runs every sequence's tokens; float32 logits [those that want them, vocab_size], valid
        until the next call. On a rank of several: the columns of its part of the vocabulary."""
        ...

    def warm_up_thread(self, max_num_tokens: int) -> None:
        """Does now what the calling thread's first steps of up to so many tokens would wait for."""
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
        """As `forward`, for up to `max_rows_ahead` sequences that decode. token_ids: [len(steps)]
        int64 on the device, theirs instead of the steps'."""
        ...
