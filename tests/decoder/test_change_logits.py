"""The kernel that changes logits against its plain form: on a Hopper GPU if there is one, else in
Triton's interpreter."""

from __future__ import annotations

import math
import random

import pytest
import torch

from runtime.decoder.kernels.logit_changes import CHUNK, LogitChanges, change_logits
from tests.conftest import HAS_HOPPER

pytest.importorskip("triton", reason="triton is not installed")

from runtime.decoder.kernels import change_logits as kernel

DEVICE = torch.device("cuda" if HAS_HOPPER else "cpu")
NUM_SLOTS = 9


def random_changes(rng: random.Random, num_rows: int, vocab_size: int) -> LogitChanges:
    """A part of the rows, each with up to 80 pairs, ends of chunks among them."""
    rows = sorted(rng.sample(range(num_rows), rng.randint(1, num_rows)))
    pairs = []
    for row in range(len(rows)):
        tokens = {0, CHUNK - 1, CHUNK, vocab_size - 1} if rng.random() < 0.5 else set()
        tokens |= {rng.randrange(vocab_size) for _ in range(rng.choice([0, 3, 80]))}
        tokens = {token for token in tokens if token < vocab_size}
        pairs += [(row, token, rng.choice([0.0, rng.uniform(-9, 9)])) for token in sorted(tokens)]
    penalties = [
        (rng.choice([1.0, 1.3, 0.7]), rng.choice([0.0, 0.5]), rng.choice([0.0, -0.3])) for _ in rows
    ]
    slots = rng.sample(range(NUM_SLOTS), len(rows))
    return LogitChanges.of(num_rows, rows, slots, penalties, pairs, vocab_size, DEVICE)


@pytest.mark.parametrize("has_counts", [True, False])
@pytest.mark.parametrize("vocab_size", [97, CHUNK, 2 * CHUNK + 333])
def test_every_setting_of_every_row_is_that_of_the_plain_form(
    vocab_size: int, has_counts: bool
) -> None:
    rng = random.Random(vocab_size)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        num_rows = rng.randint(1, NUM_SLOTS)
        logits = 4 * torch.randn(num_rows, vocab_size, generator=generator)
        changes = random_changes(rng, num_rows, vocab_size)
        counts = torch.randint(0, 6, (NUM_SLOTS, vocab_size), generator=generator)
        counts = counts.to(DEVICE, torch.int32)
        num_pairs = len(changes.biases)
        is_banned = torch.rand(num_pairs, generator=generator) < 0.3
        bans = torch.where(is_banned, -math.inf, 0.0).to(DEVICE)
        asked = logits.to(DEVICE), changes, counts if has_counts else None, bans
        found, expected = kernel.change_logits(*asked), change_logits(*asked)
        assert torch.equal(found, expected)
        assert torch.equal(asked[0].cpu(), logits), "the model's logits stay"
        untouched = changes.places.cpu() < 0
        assert torch.equal(found.cpu()[untouched], logits[untouched])
        assert int(torch.isneginf(found).sum()) == int(is_banned.sum())
