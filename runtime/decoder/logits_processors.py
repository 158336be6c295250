"""What settings change in a row of logits before its token is drawn.

In Hugging Face's order and by its formulas (transformers, generation/logits_process.py): biases,
repetition penalty, bad words, min_tokens. Presence and frequency penalty, which it lacks, come
after the repetition penalty, by OpenAI's formula. A row without such settings is left as it is,
and a batch without such rows costs nothing.

What a row needs to know of its tokens lives on the device and is updated there as soon as a token
is drawn: a step may be launched before the host knows the tokens of the one before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from runtime.decoder.executor import DecoderRequest
from runtime.decoder.scheduler import Sequence

_IN_PROMPT, _DRAWN = 1, 2
"""A count is 1 where the prompt holds the token, and 2 more for each time that it was drawn."""
_NO_TOKEN = -1


def changes_logits(request: DecoderRequest) -> bool:
    """Whether any setting of the request is one for this file."""
    params = request.sampling
    return bool(params.has_penalty or params.logit_bias or params.min_tokens or request.bad_words)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The settings of the m rows of a batch that have any, on the device."""

    sequences: list[Sequence]
    rows: torch.Tensor  # [m] int64, in the batch
    slots: torch.Tensor  # [m] int64, in the counts and tails
    # [repetition, presence, frequency] x [m, 1] float32; None where no row has a penalty.
    penalties: torch.Tensor | None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # row, token id, value: each [b]
    # Row, last token [w] and the tokens before it [w, longest], filled from the left with -1.
    bad_words: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


class LogitsProcessors:
    """Of up to `max_batch_size` sequences at once. Allocates on the device what the first request
    with a setting needs.

    counts: [max_batch_size, vocab_size] int32, once there is a penalty. tails:
    [max_batch_size, longest] int64, the last tokens, once there is a bad word of several tokens.
    """

    def __init__(self, max_batch_size: int, vocab_size: int, device: torch.device) -> None:
        self._max_batch_size, self._vocab_size, self._device = max_batch_size, vocab_size, device
        self._slots: dict[Sequence, int] = {}
        self._counts: torch.Tensor | None = None
        self._tails: torch.Tensor | None = None
        self._batch: list[Sequence] = []  # of the last call, with its rows
        self._rows: _Rows | None = None

    def apply(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """logits: [n, vocab_size] float32, a row a sequence. Returns them, or changed copies."""
        rows = self._rows_of(sequences)
        if rows is None:
            return logits
        chosen = logits[rows.rows]
        if rows.bias is not None:
            row, token_ids, values = rows.bias
            chosen[row, token_ids] += values
        if rows.penalties is not None:
            assert self._counts is not None, "a penalty makes them"
            repetition, presence, frequency = rows.penalties
            counts = self._counts[rows.slots]
            divided = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
            chosen = torch.where(counts > 0, divided, chosen)
            num_drawn = counts // _DRAWN
            chosen -= num_drawn * frequency + (num_drawn > 0) * presence
        if rows.bad_words is not None:
            row, last, before = rows.bad_words
            is_next = torch.ones_like(row, dtype=torch.bool)
            if before.shape[1]:
                assert self._tails is not None
                tails = self._tails[rows.slots[row], -before.shape[1] :]
                is_next = ((before == _NO_TOKEN) | (before == tails)).all(dim=1)
            # Adding, as several words of a row may end in one token.
            ban = torch.where(is_next, -math.inf, 0.0)
            chosen.index_put_((row, last), ban, accumulate=True)
        self._ban_ends(rows.sequences, chosen)
        changed = logits.clone()
        changed[rows.rows] = chosen
        return changed

    def count(self, sequences: list[Sequence], token_ids: torch.Tensor) -> None:
        """Takes the tokens [n] that were drawn from what `apply` returned last."""
        rows = self._rows_of(sequences)
        if rows is None:
            return
        token_ids = token_ids[rows.rows]
        if self._counts is not None:
            self._counts[rows.slots, token_ids] += _DRAWN
        if self._tails is not None:
            moved = torch.cat([self._tails[rows.slots, 1:], token_ids[:, None]], dim=1)
            self._tails[rows.slots] = moved

    def _ban_ends(self, sequences: list[Sequence], chosen: torch.Tensor) -> None:
        """min_tokens: which tokens end an answer, as long as it must go on."""
        pairs = [
            (row, token_id)
            for row, sequence in enumerate(sequences)
            if sequence.num_generated < sequence.request.sampling.min_tokens
            for token_id in sequence.request.stop_ids
            if token_id < self._vocab_size
        ]
        if pairs:
            row, token_ids = self._to_device(torch.tensor(pairs)).T
            chosen[row, token_ids] = -math.inf

    def _rows_of(self, sequences: list[Sequence]) -> _Rows | None:
        """Made once for steps of the same sequences."""
        if not any(sequence.changes_logits for sequence in sequences):
            return None
        if self._batch != sequences:
            self._rows = self._make_rows(sequences)
            self._batch = list(sequences)
        return self._rows

    def _make_rows(self, sequences: list[Sequence]) -> _Rows:
        rows = [row for row, sequence in enumerate(sequences) if sequence.changes_logits]
        chosen = [sequences[row] for row in rows]
        params = [sequence.request.sampling for sequence in chosen]
        slots = self._slots_of(chosen)
        penalties: torch.Tensor | None = None
        if any(each.has_penalty for each in params):
            table = [
                (each.repetition_penalty, each.presence_penalty, each.frequency_penalty)
                for each in params
            ]
            values = self._to_device(torch.tensor(table, dtype=torch.float32))
            penalties = values.T[:, :, None]
        return _Rows(
            chosen,
            self._to_device(torch.tensor(rows)),
            self._to_device(torch.tensor(slots)),
            penalties,
            self._bias_of(chosen),
            self._bad_words_of(chosen),
        )

    def _bias_of(
        self, sequences: list[Sequence]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        found = [
            (row, token_id, bias)
            for row, sequence in enumerate(sequences)
            for token_id, bias in sequence.request.sampling.logit_bias
        ]
        if not found:
            return None
        rows, token_ids, values = zip(*found, strict=True)
        indices = self._to_device(torch.tensor([rows, token_ids]))
        return *indices, self._to_device(torch.tensor(values, dtype=torch.float32))

    def _bad_words_of(
        self, sequences: list[Sequence]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        found = [
            (row, word)
            for row, sequence in enumerate(sequences)
            for word in sequence.request.bad_words
        ]
        if not found:
            return None
        longest = max(len(word) for _, word in found) - 1
        table = torch.tensor(
            [
                (row, word[-1], *[_NO_TOKEN] * (longest - len(word) + 1), *word[:-1])
                for row, word in found
            ]
        )
        on_device = self._to_device(table)
        return on_device[:, 0], on_device[:, 1], on_device[:, 2:]

    def _slots_of(self, sequences: list[Sequence]) -> list[int]:
        """A slot for each, which it keeps until it leaves."""
        self._slots = {s: slot for s, slot in self._slots.items() if not s.has_left}
        new = [sequence for sequence in sequences if sequence not in self._slots]
        free = sorted(set(range(self._max_batch_size)) - set(self._slots.values()))
        for sequence, slot in zip(new, free, strict=False):
            self._slots[sequence] = slot
            self._begin(sequence, slot)
        return [self._slots[sequence] for sequence in sequences]

    def _begin(self, sequence: Sequence, slot: int) -> None:
        """Counts the prompt; rows of a prompt table are no tokens."""
        request = sequence.request
        if request.sampling.has_penalty:
            if self._counts is None:
                shape = self._max_batch_size, self._vocab_size
                self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            words = sorted({i for i in request.token_ids if i < self._vocab_size})
            self._counts[slot] = 0
            self._counts[slot, self._to_device(torch.tensor(words, dtype=torch.int64))] = _IN_PROMPT
        if longest := max((len(word) for word in request.bad_words), default=1) - 1:
            self._lengthen_tails(longest)
            assert self._tails is not None
            width = self._tails.shape[1]
            tail = [_NO_TOKEN] * width + request.token_ids
            self._tails[slot] = self._to_device(torch.tensor(tail[-width:]))

    def _lengthen_tails(self, length: int) -> None:
        """At the front: rows that are there have been content with fewer."""
        width = 0 if self._tails is None else self._tails.shape[1]
        if width < length:
            shape = self._max_batch_size, length
            tails = torch.full(shape, _NO_TOKEN, dtype=torch.int64, device=self._device)
            if self._tails is not None:
                tails[:, length - width :] = self._tails
            self._tails = tails

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self._device, non_blocking=True)
