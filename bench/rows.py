"""What a benchmark measured: a row for each phase, for the first pictures and for each rate."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Row:
    """One measured phase beside the ceiling that binds it.

    ms: the median step's or pass's. rate: bytes a second of a decode step, else floating-point
    operations; share: of the ceiling. num_tokens: context, prompt, or positions of all tiles.
    """

    phase: str
    num_layers: int
    batch_size: int
    num_tokens: int
    ms: float
    tokens_per_s: float
    rate: float
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        is_decode = self.phase.startswith("decode")
        unit, rate = ("GB/s", self.rate / 1e9) if is_decode else ("TFLOP/s", self.rate / 1e12)
        return (
            f"{self.phase:<16}{self.num_layers:>3} layers, batch {self.batch_size:<3} "
            f"{self.num_tokens:>5} tokens {self.ms:9.3f} ms {self.tokens_per_s:10.1f} tokens/s "
            f"{rate:8.1f} {unit} ({self.share:.1%})"
        )


@dataclass(frozen=True, slots=True)
class FirstPictures:
    """Pictures alone and one by one, the first requests of a server that has just become ready.

    first_token_ms: from submission to the first token, in order. num_tokens: a prompt's.
    """

    phase: str
    num_layers: int
    batch_size: int
    num_tokens: int
    first_token_ms: list[float]
    first_over_last: float

    def __str__(self) -> str:
        first, *_, last = self.first_token_ms
        return (
            f"{self.phase}: the first after ready {first:.1f} ms, number "
            f"{len(self.first_token_ms)} {last:.1f} ms, {self.first_over_last:.2f} times"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Interactive:
    """What the texts and the pictures waited for at one rate of pictures a second.

    gap_ms: between consecutive tokens of a text request: p50, p90, p99, max. first_token_ms: of the
    pictures: median, max, first, tenth; empty without pictures, without tenth below ten.
    num_tokens: the texts' context. num_restarts: texts that ended and came again. max_step_ms: the
    decoder's, 0 is no bound.
    """

    phase: str
    num_layers: int
    batch_size: int
    num_tokens: int
    picture_rate: float
    seconds: float
    num_gaps: int
    gap_ms: dict[str, float]
    num_pictures: int
    first_token_ms: dict[str, float]
    num_restarts: int
    max_step_ms: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.phase}, {self.picture_rate:g} pictures/s for {self.seconds:g} s, "
            f"max_step_ms {self.max_step_ms:g}: "
            f"gaps {_percentiles(self.gap_ms)} ms of {self.num_gaps}; "
            f"first token {_percentiles(self.first_token_ms) or 'none'} ms of {self.num_pictures}"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gap_percentiles(gaps: list[float]) -> dict[str, float]:
    """p50, p90, p99 and max."""
    p50, p90, p99, most = np.percentile(gaps, [50, 90, 99, 100]).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "max": most}


def first_token_summary(waits: list[float]) -> dict[str, float]:
    """median, max, first and tenth, as far as there are any."""
    if not waits:
        return {}
    found = {"median": float(np.median(waits)), "max": max(waits), "first": waits[0]}
    return found | ({"tenth": waits[9]} if len(waits) > 9 else {})


def _percentiles(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())
