"""What settings change in a row of logits before its token is drawn.

In Hugging Face's order and by its formulas (transformers, generation/logits_process.py): biases,
repetition penalty, bad words, min_tokens. Presence and frequency penalty, which are not in it, come
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
from runtime.decoder.kernels.logit_changes import (
    DRAWN,
    IN_PROMPT,
    LogitChanges,
    change_logits_for,
)
from runtime.decoder.scheduler import Sequence

_NO_TOKEN = -1


def changes_logits(request: DecoderRequest) -> bool:
    """Whether any setting of the request is one for this file."""
    params = request.sampling
    return bool(params.has_penalty or params.logit_bias or params.min_tokens or request.bad_words)


@dataclass(frozen=True, slots=True)
class _Rows:
    """The settings of the m rows of a batch that have any, on the device."""

    sequences: list[Sequence]  # one a row
    changes: LogitChanges  # penalties and biases of all rows
    # For w bad words: the one of p pairs of a row and a token that each ends in [w] int64, and the
    # tokens before it [w, longest], filled from the left with -1; None without bad words.
    bad_words: tuple[torch.Tensor, torch.Tensor] | None
    # The pairs of tokens that end an answer with min_tokens [e] int64, and their rows.
    ends: tuple[torch.Tensor, torch.Tensor] | None


class LogitsProcessors:
    """Changes the logits of up to `max_batch_size` sequences at once, as their settings say.
    Allocates on the device what the first request with a setting needs.

    counts: [max_batch_size, vocab_size] int32, once there is a penalty. tails:
    [max_batch_size, longest] int64, the last tokens, once there is a bad word of several tokens.
    """

    def __init__(self, max_batch_size: int, vocab_size: int, device: torch.device) -> None:
        self._max_batch_size, self._vocab_size, self._device = max_batch_size, vocab_size, device
        self._change = change_logits_for(device)
        self._slots: dict[Sequence, int] = {}
        self._counts: torch.Tensor | None = None
        self._tails: torch.Tensor | None = None
        self._batch: list[Sequence] = []  # sequences of the last call
        self._rows: _Rows | None = None
        self._held: tuple[list[bool], torch.Tensor] | None = None  # rows that must not end yet

    def apply(self, sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
        """logits: [n, vocab_size] float32, a row a sequence. Returns them, or changed copies."""
        rows = self._rows_of(sequences)
        if rows is None:
            return logits
        bans = torch.zeros_like(rows.changes.biases)
        if rows.bad_words is not None:
            pairs, before = rows.bad_words
            is_next = torch.ones_like(pairs, dtype=torch.bool)
            if before.shape[1]:
                assert self._tails is not None
                slots = rows.changes.slots[rows.changes.pair_rows[pairs]]
                tails = self._tails[slots, -before.shape[1] :]
                is_next = ((before == _NO_TOKEN) | (before == tails)).all(dim=1)
            # Adding, as several words of a row may end in one token.
            bans.index_put_((pairs,), torch.where(is_next, -math.inf, 0.0), accumulate=True)
        if rows.ends is not None:
            pairs, of_rows = rows.ends
            bans[pairs] += self._held_back(rows.sequences)[of_rows]
        return self._change(logits, rows.changes, self._counts, bans)

    def _held_back(self, sequences: list[Sequence]) -> torch.Tensor:
        """[m] float32: -inf for a row that has not min_tokens yet, else 0."""
        held = [each.num_generated < each.request.sampling.min_tokens for each in sequences]
        if self._held is None or self._held[0] != held:
            values = torch.tensor([-math.inf if each else 0.0 for each in held])
            self._held = held, self._to_device(values)
        return self._held[1]

    def count(self, sequences: list[Sequence], token_ids: torch.Tensor) -> None:
        """Takes the tokens [n] that were drawn from what `apply` returned last."""
        rows = self._rows_of(sequences)
        if rows is None:
            return
        slots, token_ids = rows.changes.slots, token_ids[rows.changes.rows]
        if self._counts is not None:
            self._counts[slots, token_ids] += DRAWN
        if self._tails is not None:
            moved = torch.cat([self._tails[slots, 1:], token_ids[:, None]], dim=1)
            self._tails[slots] = moved

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
        slots = self._slots_of(chosen)
        words = [(row, each) for row, s in enumerate(chosen) for each in s.request.bad_words]
        ends = [
            (row, token_id)
            for row, sequence in enumerate(chosen)
            if sequence.num_generated < sequence.request.sampling.min_tokens
            for token_id in sequence.request.stop_ids
            if token_id < self._vocab_size
        ]
        biases = {
            (row, token_id): bias
            for row, sequence in enumerate(chosen)
            for token_id, bias in sequence.request.sampling.logit_bias
        }
        pairs = sorted({*biases, *ends, *((row, word[-1]) for row, word in words)})
        place_of = {pair: place for place, pair in enumerate(pairs)}
        changes = LogitChanges.of(
            len(sequences),
            rows,
            slots,
            [
                (each.repetition_penalty, each.presence_penalty, each.frequency_penalty)
                for each in (sequence.request.sampling for sequence in chosen)
            ],
            [(row, token_id, biases.get((row, token_id), 0.0)) for row, token_id in pairs],
            self._vocab_size,
            self._device,
        )
        return _Rows(
            chosen,
            changes,
            self._bad_words_of(words, place_of),
            self._ends_of(ends, place_of),
        )

    def _bad_words_of(
        self, words: list[tuple[int, tuple[int, ...]]], place_of: dict[tuple[int, int], int]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not words:
            return None
        longest = max(len(word) for _, word in words) - 1
        table = [
            (place_of[row, word[-1]], *[_NO_TOKEN] * (longest - len(word) + 1), *word[:-1])
            for row, word in words
        ]
        on_device = self._to_device(torch.tensor(table))
        return on_device[:, 0], on_device[:, 1:]

    def _ends_of(
        self, ends: list[tuple[int, int]], place_of: dict[tuple[int, int], int]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not ends:
            return None
        table = torch.tensor([(place_of[pair], pair[0]) for pair in ends])
        on_device = self._to_device(table)
        return on_device[:, 0], on_device[:, 1]

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
            self._counts[slot, self._to_device(torch.tensor(words, dtype=torch.int64))] = IN_PROMPT
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
