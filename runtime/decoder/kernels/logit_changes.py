"""What settings add to and take from rows of logits, in plain torch, and which kernel does so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvlm.planning import hopper

IN_PROMPT, DRAWN = 1, 2
"""A count is 1 where the prompt holds the token, and 2 more for each time that it was drawn."""

CHUNK = 2048
"""Tokens of a row that one program of the kernel changes."""


@dataclass(frozen=True, slots=True)
class LogitChanges:
    """What changes the logits of m rows in a batch of n, on the device. Pairs of a row and a token
    have a bias or may be banned; no pair comes twice, and they stand in order."""

    rows: torch.Tensor  # [m] int64, in the batch
    places: torch.Tensor  # [n] int32: which of the m a row is; -1 for none
    slots: torch.Tensor  # [m] int64, in the counts
    penalties: torch.Tensor  # repetition, presence, frequency: [3, m] float32
    pair_rows: torch.Tensor  # [p] int64, of the m
    pair_tokens: torch.Tensor  # [p] int64
    biases: torch.Tensor  # [p] float32
    starts: torch.Tensor  # [m, chunks + 1] int32: where a row's chunk begins among the pairs

    @classmethod
    def of(
        cls,
        num_rows: int,
        rows: list[int],
        slots: list[int],
        penalties: list[tuple[float, float, float]],
        pairs: list[tuple[int, int, float]],
        vocab_size: int,
        device: torch.device,
    ) -> LogitChanges:
        """num_rows: n. penalties: as `penalties`, a triple a row. pairs: row, token, bias."""

        def on_device(values: torch.Tensor) -> torch.Tensor:
            return values.to(device, non_blocking=True)

        places = torch.full((num_rows,), -1, dtype=torch.int32)
        places[rows] = torch.arange(len(rows), dtype=torch.int32)
        pair_rows = torch.tensor([row for row, _, _ in pairs], dtype=torch.int64)
        pair_tokens = torch.tensor([token_id for _, token_id, _ in pairs], dtype=torch.int64)
        num_chunks = -(-vocab_size // CHUNK)
        bounds = torch.arange(len(rows))[:, None] * vocab_size
        bounds = bounds + (torch.arange(num_chunks + 1) * CHUNK).clamp(max=vocab_size)
        starts = torch.searchsorted(pair_rows * vocab_size + pair_tokens, bounds)
        return cls(
            on_device(torch.tensor(rows)),
            on_device(places),
            on_device(torch.tensor(slots)),
            on_device(torch.tensor(penalties, dtype=torch.float32).T.contiguous()),
            on_device(pair_rows),
            on_device(pair_tokens),
            on_device(torch.tensor([bias for _, _, bias in pairs], dtype=torch.float32)),
            on_device(starts.to(torch.int32)),
        )


ChangeLogits = Callable[
    [torch.Tensor, LogitChanges, torch.Tensor | None, torch.Tensor], torch.Tensor
]


def change_logits(
    logits: torch.Tensor, changes: LogitChanges, counts: torch.Tensor | None, bans: torch.Tensor
) -> torch.Tensor:
    """A copy of logits [n, vocab_size] float32: biases added, then the repetition penalty, presence
    and frequency penalty, and the bans.

    counts: [slots, vocab_size] int32, None where no row has a penalty. bans: 0 or -inf for each
    pair, [p] float32.
    """
    chosen = logits[changes.rows]
    pairs = changes.pair_rows, changes.pair_tokens
    chosen[pairs] += changes.biases
    if counts is not None:
        repetition, presence, frequency = changes.penalties[:, :, None]
        counted = counts[changes.slots]
        divided = torch.where(chosen < 0, chosen * repetition, chosen / repetition)
        chosen = torch.where(counted > 0, divided, chosen)
        num_drawn = counted // DRAWN
        chosen -= num_drawn * frequency + (num_drawn > 0) * presence
    chosen[pairs] += bans
    changed = logits.clone()
    changed[changes.rows] = chosen
    return changed


def change_logits_for(device: torch.device) -> ChangeLogits:
    """The kernel where it runs, else the plain form."""
    if not hopper.has_kernels(device):
        return change_logits
    from runtime.decoder.kernels import change_logits as kernel

    return kernel.change_logits
