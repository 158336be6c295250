"""Two runs of a task sample by sample: what changed, and whether it could be chance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.datasets.sample import SampleId
from evaluation.reporting.paired_test import paired_test
from evaluation.scoring.score import TaskScore
from nvlm.program.errors import UserError


@dataclass(frozen=True, slots=True)
class Change:
    """One sample whose answer differs."""

    id: SampleId  # of the sample
    answer: str  # this run's
    other_answer: str  # the other's
    gain: float  # what this run scores above the other


@dataclass(frozen=True, slots=True)
class Comparison:
    """Over the samples that both runs answered, this run minus the other, in the task's unit."""

    value: float  # this run's score
    other_value: float  # the other's
    num_paired: int  # samples that both answered
    changes: list[Change]  # samples whose answers differ
    interval: tuple[float, float]  # 95 %, of the difference
    # How often chance alone, were the two runs alike, would part them this far or further; two-
    # sided.
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
    largest = max(1.0, float(np.abs([values, others]).max()))
    found = paired_test(gains, largest)
    low, high = found.interval
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
        interval=(scale * len(paired) * low, scale * len(paired) * high),
        p_value=found.p_value,
    )
