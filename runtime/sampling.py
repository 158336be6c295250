"""How the next token is chosen from a row of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nvlm.errors import UserError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """temperature 0 or top_k 1 is greedy; top_k 0 and top_p 1 switch that filter off.

    With the same seed a request's tokens do not depend on what runs beside it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise UserError(f"temperature is {self.temperature}, expected 0 (greedy) to 100")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}, expected 0 (off) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}, expected above 0 and at most 1 (off)")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}, expected 0 to 2^64 - 1")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


def sample(logits: torch.Tensor, params: SamplingParams, step: int) -> int:
    """The token drawn from one row of logits [vocab_size] float32 at the request's `step`.

    Temperature, then the top_k most likely, then the smallest set of them whose probability
    reaches top_p ("The Curious Case of Neural Text Degeneration", arXiv 1904.09751).
    """
    if params.is_greedy:
        return int(logits.argmax())
    # In float64 no accepted temperature underflows to 0 and no quotient is 0 / 0.
    scaled = (logits - logits.max()).to(torch.float64) / params.temperature
    probabilities, token_ids = torch.softmax(scaled, dim=-1).sort(descending=True, stable=True)
    if params.top_k:
        probabilities = probabilities[: params.top_k]
    cumulative = (probabilities / probabilities.sum()).cumsum(-1)
    if params.top_p < 1.0:
        kept = int((cumulative < params.top_p).sum()) + 1
        cumulative = cumulative[:kept]
    # Inverse transform: the first token whose cumulative probability exceeds a uniform number.
    threshold = _uniform(params.seed, step) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, threshold, right=True))
    return int(token_ids[min(index, len(cumulative) - 1)])


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone (Philox, SC 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step])).random())
