"""What a scorer gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evaluation.datasets.sample import SampleId

Line = dict[str, Any]
"""An answer line as `evaluate.py generate` (or Megatron-LM) wrote it."""


@dataclass(frozen=True, slots=True)
class SampleScore:
    """The score of one answer."""

    value: float  # 0 to 1, or points
    answer: str  # that was scored
    truth: list[str]  # what was expected, for people to read


@dataclass(frozen=True, slots=True)
class TaskScore:
    """The score of a task."""

    value: float  # the headline: a mean in percent, or a sum of points (OCRBench)
    samples: dict[SampleId, SampleScore]  # by id
    # Further numbers by name, in the same unit unless the name says otherwise.
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the answer lines do not have."""

    # MMMU's answers by id, or the captions' annotation file.
    answers: dict[str, Any] = field(default_factory=dict)


Scorer = Callable[[dict[SampleId, Line], Truth], TaskScore]


def mean_percent(values: list[float]) -> float:
    return 100.0 * sum(values) / len(values) if values else 0.0
