"""Draws the next token of each request from its row of logits, as its settings say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from runtime.requests.sampling import SamplingParams


def sample_rows(
    logits: torch.Tensor, params: Sequence[SamplingParams], steps: Sequence[int]
) -> torch.Tensor:
    """A token for every row of logits [n, vocab_size], each as if it were alone: [n] int64, on the
    logits' device, without waiting for it.

    Temperature, then the top_k most likely, then the smallest set of them whose probability
    reaches top_p ("The Curious Case of Neural Text Degeneration", arXiv 1904.09751), then those of
    at least min_p times the likeliest one's probability (arXiv 2407.01082).
    """
    token_ids = logits.argmax(-1)
    drawn = [i for i, each in enumerate(params) if not each.is_greedy]
    if drawn:
        rows = torch.tensor(drawn).to(logits.device, non_blocking=True)
        chosen = _draw(logits[rows], [params[i] for i in drawn], [steps[i] for i in drawn])
        token_ids[rows] = chosen
    return token_ids


def _draw(
    logits: torch.Tensor, params: Sequence[SamplingParams], steps: Sequence[int]
) -> torch.Tensor:
    vocab_size = logits.shape[1]
    settings = torch.tensor(
        [
            (each.temperature, each.top_k or vocab_size, each.top_p, _uniform(each.seed or 0, step))
            for each, step in zip(params, steps, strict=True)
        ],
        dtype=torch.float64,
    ).to(logits.device, non_blocking=True)
    temperature, top_k, top_p, uniform = settings.T[:, :, None]  # each [n, 1]
    # Sorted as float32, which has half the bits. In float64 no accepted temperature underflows to
    # 0 and no quotient is 0 / 0.
    logits, token_ids = logits.sort(descending=True, stable=True)
    scaled = (logits - logits[:, :1]).to(torch.float64) / temperature
    probabilities = torch.softmax(scaled, dim=-1)
    probabilities *= torch.arange(vocab_size, device=logits.device) < top_k
    cumulative = (probabilities / probabilities.sum(-1, keepdim=True)).cumsum(-1)
    num_kept = torch.where(top_p < 1.0, (cumulative < top_p).sum(-1, keepdim=True) + 1, top_k)
    last = torch.minimum(num_kept, top_k).clamp(max=vocab_size).to(torch.int64) - 1
    if any(each.min_p > 0.0 for each in params):
        min_p = torch.tensor([[each.min_p] for each in params], dtype=torch.float64)
        least = min_p.to(logits.device, non_blocking=True) * probabilities[:, :1]
        num_likely = (probabilities >= least).sum(-1, keepdim=True)
        last = torch.minimum(last, num_likely - 1)
    # Inverse transform: the first token whose cumulative probability exceeds a uniform number.
    threshold = uniform * cumulative.gather(-1, last)
    index = torch.searchsorted(cumulative, threshold, right=True)
    return token_ids.gather(-1, torch.minimum(index, last))[:, 0]


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on seed and step alone (Philox, SC 2011)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step])).random())
