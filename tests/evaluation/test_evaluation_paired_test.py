"""The paired test and its interval: against scipy's own, every outcome counted, and each other."""

from __future__ import annotations

import itertools
import time
from math import erfc, sqrt

import numpy as np
import pytest
from scipy import stats

from evaluation.reporting.paired_test import paired_test


def test_few_graded_gains_are_signed_in_every_way() -> None:
    """Two of the 8 signings of 1/3, 2/3, 1 reach the sum of 2."""
    assert paired_test(np.array([1 / 3, 2 / 3, 1.0, 0.0]), 1.0).p_value == pytest.approx(2 / 8)
    gains = np.random.default_rng(3).choice([-2 / 3, -1 / 3, 1 / 3, 1.0], 12)
    expected = stats.permutation_test(
        (gains,), np.sum, permutation_type="samples", n_resamples=5000
    )
    assert paired_test(gains, 1.0).p_value == pytest.approx(expected.pvalue)


def test_many_graded_gains_are_signed_at_random_within_the_error_of_that() -> None:
    """All 262,144 signings of 18 gains, repeated and single ones, within four standard errors."""
    gains = np.array([1 / 3] * 8 + [-2 / 3] * 3 + [0.11, 0.12, -0.13, 0.5, 0.7, -0.9, 1.0])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(gains))))
    expected = float((np.abs(signs @ gains) >= abs(gains.sum()) - 1e-9).mean())
    error = sqrt(expected * (1 - expected) / 99_999)
    assert paired_test(gains, 1.0).p_value == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("kind", ["VQA accuracy", "ANLS", "in pairs"])
def test_ten_thousand_graded_gains_take_a_moment(kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "VQA accuracy":
        gains = rng.choice([-1, -2 / 3, -1 / 3, 1 / 3, 2 / 3, 1], 10_000)
    else:
        gains = rng.uniform(-1.0, 1.0, 10_000 if kind == "ANLS" else 5_000)
        gains = np.resize(gains, 10_000)
    started = time.perf_counter()
    found = paired_test(gains, 1.0).p_value
    assert time.perf_counter() - started < 5.0, (
        "75 s with every sign drawn alone, 9 with a bit for each"
    )
    z = abs(gains.sum()) / sqrt((gains**2).sum())
    assert found == pytest.approx(erfc(z / sqrt(2)), abs=0.01), "the normal approximation"


@pytest.mark.parametrize("num_unequal", [1, 5, 6, 12, 40])
def test_the_interval_holds_zero_when_the_test_does_not_refuse_it(num_unequal: int) -> None:
    rng = np.random.default_rng(num_unequal)
    for kind in ([-1.0, 1.0], [-1.0, -1 / 3, 1 / 3, 2 / 3, 1.0]):
        for lean in np.linspace(0.0, 1.0, 9):
            drawn = np.abs(rng.choice(kind, num_unequal)) * rng.choice(
                [-1, 1], num_unequal, p=[lean, 1 - lean]
            )
            found = paired_test(np.concatenate([drawn, np.zeros(20)]), 1.0)
            low, high = found.interval
            assert (low <= 0.0 <= high) == (found.p_value >= 0.05), (found, drawn)
            assert low <= drawn.sum() / (num_unequal + 20) <= high


def test_no_change_in_eight_samples_is_no_proof_of_none() -> None:
    """Were 36.9 % to change, none of 8 would with 2.5 %."""
    found = paired_test(np.zeros(8), 1.0)
    assert found.p_value == 1.0
    assert found.interval == pytest.approx((-0.3694, 0.3694), abs=1e-4)
    low, high = paired_test(np.array([-1.0] * 3 + [0.0] * 5), 1.0).interval
    assert low < -0.375 < 0.0 < high


def test_many_samples_give_the_interval_of_the_normal_approximation() -> None:
    """A little more: a product of two intervals is wider where the difference is far from 0."""
    gains = np.array([1.0] * 300 + [-1.0] * 200 + [0.0] * 4500)
    half = 1.96 * gains.std() / sqrt(len(gains))
    low, high = paired_test(gains, 1.0).interval
    assert 0.95 * half < gains.mean() - low < 1.3 * half
    assert 0.95 * half < high - gains.mean() < 1.3 * half
    graded = np.random.default_rng(1).choice([-2 / 3, -1 / 3, 1 / 3, 1.0], 800)
    gains = np.concatenate([graded, np.zeros(4200)])
    half = 1.96 * gains.std() / sqrt(len(gains))
    low, high = paired_test(gains, 1.0).interval
    assert 0.95 * half < gains.mean() - low < 1.3 * half
    assert 0.95 * half < high - gains.mean() < 1.3 * half


@pytest.mark.parametrize("number", [6, 15])
def test_the_interval_of_right_and_wrong_covers_the_truth(number: int) -> None:
    """Every outcome of so many samples, weighed: 95 % or more, whatever the two chances are."""
    outcomes = [(b, c) for b in range(number + 1) for c in range(number + 1 - b)]
    intervals = []
    for better, worse in outcomes:
        same = number - better - worse
        gains = np.array([1.0] * better + [-1.0] * worse + [0.0] * same)
        intervals.append(paired_test(gains, 1.0).interval)
    for p, q in itertools.product((0.0, 0.02, 0.1, 0.25, 0.4, 0.7), repeat=2):
        if p + q > 1.0:
            continue
        weights = stats.multinomial.pmf(
            [(b, c, number - b - c) for b, c in outcomes], number, [p, q, 1 - p - q]
        )
        covered = [low - 1e-12 <= p - q <= high + 1e-12 for low, high in intervals]
        assert float(weights[covered].sum()) >= 0.95, (p, q)
