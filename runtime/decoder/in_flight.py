"""A step that is launched and whose tokens the host has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.decoder.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class UndrawnStep:
    """A forward pass that is launched before the tokens are known that its guides have to see.

    sequences: one each of `logits` [n, vocab_size] float32.
    """

    sequences: list[Sequence]
    logits: torch.Tensor


class InFlightStep:
    """sequences: those that draw, each one of `token_ids` [n] int64, which may be on a GPU.
    logits: of those that ask for them."""

    def __init__(
        self,
        sequences: list[Sequence],
        logits: list[torch.Tensor | None],
        token_ids: torch.Tensor,
    ) -> None:
        self.sequences, self.logits = sequences, logits
        self._token_ids = token_ids
        self._copied: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def tokens_of(self, sequences: list[Sequence]) -> torch.Tensor:
        """The tokens of some sequences, on the device, for the step that is launched upon them.
        All are copied to the host before it, so that `tolist` waits for this step alone."""
        if self._token_ids.device.type == "cuda":
            host = torch.empty_like(self._token_ids, device="cpu", pin_memory=True)
            host.copy_(self._token_ids, non_blocking=True)
            self._copied = host, torch.cuda.Event()
            self._copied[1].record()
        if sequences == self.sequences:
            return self._token_ids
        row_of = {id(sequence): row for row, sequence in enumerate(self.sequences)}
        rows = torch.tensor([row_of[id(sequence)] for sequence in sequences])
        return self._token_ids[rows.to(self._token_ids.device, non_blocking=True)]

    def tolist(self) -> list[int]:
        token_ids = self._token_ids
        if self._copied is not None:
            token_ids, event = self._copied
            event.synchronize()
        values: list[int] = token_ids.tolist()
        return values
