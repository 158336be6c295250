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
    """`value`: 0 to 1, or points; `truth`: what was expected, for people to read."""

    value: float
    answer: str
    truth: list[str]


@dataclass(frozen=True, slots=True)
class TaskScore:
    """`value` is the headline: a mean in percent, or a sum of points (OCRBench). `details` are
    further numbers by name, in the same unit unless the name says otherwise."""

    value: float
    samples: dict[SampleId, SampleScore]
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Truth:
    """What the answer lines do not have: MMMU's answers by id, the captions' annotation file."""

    answers: dict[str, Any] = field(default_factory=dict)


Scorer = Callable[[dict[SampleId, Line], Truth], TaskScore]


def mean_percent(values: list[float]) -> float:
    return 100.0 * sum(values) / len(values) if values else 0.0
