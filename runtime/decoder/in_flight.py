"""A step that is launched and whose tokens the host has not seen."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from runtime.decoder.executor import TokenLogprobs
from runtime.decoder.logprobs import LogprobRows
from runtime.decoder.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class UndrawnStep:
    """A forward pass that is launched before the tokens are known that its guides have to see."""

    sequences: list[Sequence]  # those that draw, one a row of `logits`
    logits: torch.Tensor  # [n, vocab_size] float32
    chunks: list[Sequence]  # sequences whose prompts the step does not complete


@dataclass(eq=False, slots=True)
class InFlightStep:
    """A step whose tokens the host does not know yet."""

    sequences: list[Sequence]  # those that draw a token
    logits: list[torch.Tensor | None]  # of those that ask for them, else None; [vocab_size] each
    token_ids: torch.Tensor  # [n] int64, one a sequence; may be on a GPU
    logprobs: LogprobRows | None = None  # of the sequences that ask for them
    logprob_rows: list[int] = field(default_factory=list)  # which sequences those are
    # On the host, once `_copied` has happened:
    _host_ids: torch.Tensor | None = None
    _host_logprobs: LogprobRows | None = None  # copy in pinned memory, as above
    _copied: torch.cuda.Event | None = None  # both copies are complete

    def tokens_of(self, sequences: list[Sequence]) -> torch.Tensor:
        """The tokens of some sequences, on the device, for the step that is launched upon them.
        All are copied to the host before it, so that `tolist` waits for this step alone."""
        token_ids = self.token_ids
        if token_ids.device.type == "cuda":
            self._host_ids = _host_copy(token_ids)
            if self.logprobs is not None:
                self._host_logprobs = LogprobRows(*map(_host_copy, self.logprobs.tensors))
            self._copied = torch.cuda.Event()
            self._copied.record()
        if sequences == self.sequences:
            return token_ids
        row_of = {id(sequence): row for row, sequence in enumerate(self.sequences)}
        rows = torch.tensor([row_of[id(each)] for each in sequences], dtype=torch.int64)
        return token_ids[rows.to(token_ids.device, non_blocking=True)]

    def tolist(self) -> list[int]:
        """Waits for the tokens."""
        token_ids = self.token_ids
        if self._copied is not None:
            assert self._host_ids is not None
            token_ids = self._host_ids
            self._copied.synchronize()
        values: list[int] = token_ids.tolist()
        return values

    def logprobs_of_rows(self) -> list[TokenLogprobs | None]:
        """One for each sequence, None where it asks for none. Call it after `tolist`."""
        found: list[TokenLogprobs | None] = [None] * len(self.sequences)
        if self.logprobs is not None:
            wanted = [self.sequences[row].request.sampling for row in self.logprob_rows]
            wanted_logprobs = (self._host_logprobs or self.logprobs).tolist(
                [each.top_logprobs for each in wanted]
            )
            for row, logprobs in zip(self.logprob_rows, wanted_logprobs, strict=True):
                found[row] = logprobs
        return found


def _host_copy(values: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(values, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    return host
