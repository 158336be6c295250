"""Two runs of a task sample by sample: what changed, and whether it could be chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.packages import require_package
from evaluation.sample import SampleId
from evaluation.scoring.score import TaskScore
from nvlm.errors import UserError

_NUM_RESAMPLES = 99_999
_SEED = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One sample whose answer differs; `gain` is what this run scores above the other."""

    id: SampleId
    answer: str
    other_answer: str
    gain: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Over the samples that both runs answered, this run minus the other, in the task's unit.

    `p_value`: how often chance alone, were the two runs alike, would part them this far or
    further; two-sided. `margin`: half of the 95 % confidence interval of the difference.
    """

    value: float
    other_value: float
    num_paired: int
    changes: list[Change]
    margin: float
    p_value: float

    @property
    def difference(self) -> float:
        return self.value - self.other_value

    @property
    def num_better(self) -> int:
        return sum(change.gain > 0 for change in self.changes)

    @property
    def num_worse(self) -> int:
        return sum(change.gain < 0 for change in self.changes)


def compare(score: TaskScore, other: TaskScore, unit: str) -> Comparison:
    paired = [i for i in score.samples if i in other.samples]
    if not paired:
        raise UserError("the two runs have no sample in common; compare runs of one data set")
    values, others = (np.array([run.samples[i].value for i in paired]) for run in (score, other))
    gains = values - others
    # Points add up, everything else is a mean in percent.
    scale = 1.0 if unit == "points" else 100.0 / len(paired)
    changes = [
        Change(i, score.samples[i].answer, other.samples[i].answer, float(gain))
        for i, gain in zip(paired, gains, strict=True)
        if score.samples[i].answer != other.samples[i].answer
    ]
    return Comparison(
        value=scale * float(values.sum()),
        other_value=scale * float(others.sum()),
        num_paired=len(paired),
        changes=sorted(changes, key=lambda change: change.gain),
        margin=_margin(gains, scale),
        p_value=sign_flip_p_value(gains),
    )


def _margin(gains: NDArray[np.float64], scale: float) -> float:
    """1.96 standard errors of the sum of the gains."""
    if len(gains) < 2:
        return math.inf
    return 1.96 * scale * float(gains.std(ddof=1)) * math.sqrt(len(gains))


def sign_flip_p_value(gains: NDArray[np.float64]) -> float:
    """Paired permutation test: which run an answer came from is drawn anew for every sample.

    Samples that score alike say nothing. Where all others differ by the same (right or wrong) it
    is McNemar's exact test.
    """
    stats: Any = require_package("scipy.stats", "scipy", "--compare")
    unequal = gains[np.abs(gains) > 1e-12]
    if not len(unequal):
        return 1.0
    if np.allclose(np.abs(unequal), abs(unequal[0])):
        return float(stats.binomtest(int((unequal > 0).sum()), len(unequal)).pvalue)
    result = stats.permutation_test(
        (unequal,),
        np.sum,
        permutation_type="samples",
        n_resamples=_NUM_RESAMPLES,
        batch=1000,
        vectorized=True,
        rng=np.random.default_rng(_SEED),
    )
    return float(result.pvalue)
