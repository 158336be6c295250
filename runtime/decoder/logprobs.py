"""Log probabilities of tokens: those of the model, before any setting changes its logits."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from runtime.decoder.executor import TokenLogprobs
from runtime.decoder.scheduler import Sequence


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Log probabilities of m rows, likeliest first. They may be on a GPU."""

    chosen: torch.Tensor  # [m] of the tokens drawn
    top_values: torch.Tensor  # [m, k] of the likeliest
    top_ids: torch.Tensor  # [m, k] token ids of the likeliest

    @classmethod
    def of(cls, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobRows:
        """logits: [m, vocab_size] float32; token_ids: [m], whose own are wanted; num_top: k."""
        normaliser = logits.logsumexp(-1, keepdim=True)
        chosen = logits.gather(-1, token_ids[:, None]) - normaliser
        top = logits.topk(min(num_top, logits.shape[1]), dim=-1)
        return cls(chosen[:, 0], top.values - normaliser, top.indices)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.chosen, self.top_values, self.top_ids

    def tolist(self, num_top: Items[int]) -> list[TokenLogprobs]:
        """Lists for each row as many of the likeliest tokens as it wants."""
        chosen, values, ids = (tensor.tolist() for tensor in self.tensors)
        return [
            TokenLogprobs(
                chosen[row], tuple(zip(ids[row][:count], values[row][:count], strict=True))
            )
            for row, count in enumerate(num_top)
        ]


def take_prompt_logprobs(
    sequences: list[Sequence], logits: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """logits: [n, vocab_size] float32 of a step's sequences, `num_logits` rows each. Keeps with
    those that want them the log probabilities of the prompt's tokens that the rows foretell, and
    returns the rows that tokens are drawn from."""
    end, drawn = 0, []
    for sequence in sequences:
        rows = logits[end : end + sequence.num_logits]
        end += sequence.num_logits
        if sequence.wants_prompt_logprobs:
            _take_prompt(sequence, rows, vocab_size)
        if sequence.is_last_chunk:
            drawn.append(end - 1)
    return logits[torch.tensor(drawn, dtype=torch.int64).to(logits.device)]


def _take_prompt(sequence: Sequence, rows: torch.Tensor, vocab_size: int) -> None:
    num_top = sequence.request.sampling.prompt_logprobs
    assert num_top is not None, "nobody asked"
    if sequence.num_cached == 0:
        sequence.prompt_logprobs = [None]  # nothing foretells the first token
    first = sequence.num_cached + 1
    followers = sequence.request.token_ids[first : first + len(rows)]
    targets = torch.tensor(followers, dtype=torch.int64).clamp(max=vocab_size - 1)
    found = LogprobRows.of(rows[: len(followers)], targets.to(rows.device), num_top)
    listed = found.tolist([num_top] * len(followers))
    sequence.prompt_logprobs += [
        logprobs if token_id < vocab_size else None
        for token_id, logprobs in zip(followers, listed, strict=True)
    ]
