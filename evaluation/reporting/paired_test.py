"""What paired gains say: how likely chance alone is, and how large the mean gain can be.

Samples that score alike say nothing about which run is better, only that few differ. So the p-value
looks at the unequal gains alone, and the interval is a product of two: of the share of samples that
differ (Clopper and Pearson, Biometrika 26, 1934), and of the mean gain among those. The second
holds 0 exactly when p is 0.05 or more, and so does the product.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.packages import require_package

_NUM_DRAWS = 99_999
_MOST_ENUMERATED = 16
_OFTEN = 64
_SEED = 0
_LEVEL = 0.05
_EQUAL = 1e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Whether two runs differ by more than chance."""

    # How often chance alone, were the two runs alike, would part them this far or further; two-
    # sided.
    p_value: float
    interval: tuple[float, float]  # 95 %, of the mean gain over all samples


def paired_test(gains: Floats, largest: float) -> PairedTest:
    """`largest`: what one sample can gain or lose at most.

    Where all unequal gains are of one size (answers are right or wrong) both parts are exact:
    McNemar's test and a binomial interval. Other gains are signed anew (paired permutation test,
    random from 17 unequal ones on), and its inversion takes them to lie evenly around their mean.
    """
    stats: Any = require_package("scipy.stats", "scipy", "--compare")

    def proportion(count: int, total: int) -> tuple[float, float]:
        found = stats.binomtest(count, total).proportion_ci(1 - _LEVEL, "exact")
        return float(found.low), float(found.high)

    unequal = gains[np.abs(gains) > _EQUAL]
    num_unequal = len(unequal)
    share = proportion(num_unequal, len(gains))
    if not num_unequal:
        return PairedTest(1.0, (-share[1] * largest, share[1] * largest))
    size = float(np.abs(unequal).max())
    if np.allclose(np.abs(unequal), size):
        num_better = int((unequal > 0).sum())
        p_value = float(stats.binomtest(num_better, num_unequal).pvalue)
        low, high = (size * (2 * p - 1) for p in proportion(num_better, num_unequal))
    else:
        test = _SignFlips(unequal)
        p_value = test.p_value(0.0)
        low, high = _inverted(test.p_value, float(unequal.mean()), largest)
    corners = [part * mean for part in share for mean in (low, high)]
    return PairedTest(p_value, (min(corners), max(corners)))


class _SignFlips:
    """The sum of gains whose signs are drawn anew: every signing of a few, 99,999 of many.

    Among n equal gains only the number of pluses counts, which is binomial. A signing's sum of
    (gain - shift) is its sum of gains less shift times its sum of signs, so one set of draws
    serves every shift.
    """

    def __init__(self, gains: Floats) -> None:
        self._total, self._number = float(gains.sum()), len(gains)
        if len(gains) <= _MOST_ENUMERATED:
            signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(gains))))
            self._sums, self._signs = signs @ gains, signs.sum(axis=1)
            self._observed = 0  # it is among them
        else:
            self._sums, self._signs = _draws(*np.unique(gains.round(9), return_counts=True))
            self._observed = 1

    def p_value(self, shift: float) -> float:
        """Two-sided, were `shift` the true mean gain."""
        found = np.abs(self._sums - shift * self._signs)
        further = found >= abs(self._total - shift * self._number) - _EQUAL
        return float((further.sum() + self._observed) / (len(found) + self._observed))


def _draws(values: Floats, counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """(sum of gains, sum of signs) of each draw. A random byte signs eight gains, by a table of its
    256 sums; a number of pluses signs all gains of a value that is often there."""
    rng = np.random.default_rng(_SEED)
    sums, signs = np.zeros(_NUM_DRAWS), np.zeros(_NUM_DRAWS)
    often = counts >= _OFTEN
    for value, count in zip(values[often], counts[often], strict=True):
        drawn = 2.0 * rng.binomial(count, 0.5, _NUM_DRAWS) - count
        sums += value * drawn
        signs += drawn
    single = np.repeat(values[~often], counts[~often])
    signings = np.array(list(itertools.product((-1.0, 1.0), repeat=8)))  # [256, 8]
    for eight in np.pad(single, (0, -len(single) % 8)).reshape(-1, 8):
        byte = rng.integers(0, 256, _NUM_DRAWS, dtype=np.uint8)
        sums += (signings @ eight)[byte]
        signs += (signings @ (eight != 0.0))[byte]
    return sums, signs


def _inverted(
    p_value: Callable[[float], float], mean: float, largest: float
) -> tuple[float, float]:
    """The shifts around the mean that the test does not refuse; 0 is among them if and only if
    the test does not refuse 0."""
    is_zero_inside = p_value(0.0) >= _LEVEL

    def end(bound: float) -> float:
        inside, outside = mean, bound
        if min(mean, bound) < 0.0 < max(mean, bound):
            inside, outside = (0.0, bound) if is_zero_inside else (mean, 0.0)
        if p_value(outside) >= _LEVEL:
            return outside
        for _ in range(40):
            middle = (inside + outside) / 2
            if p_value(middle) >= _LEVEL:
                inside = middle
            else:
                outside = middle
        return inside

    return end(-largest), end(largest)
