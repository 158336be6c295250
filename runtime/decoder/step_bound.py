"""How many tokens of prompts a step takes beside requests that decode, so that none waits long.

Made of measured steps (step_times.py). Knows numbers alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvlm.planning.hopper import CHUNK_SIZES
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK

Curve = Sequence[tuple[int, float]]
"""Prompt tokens and the milliseconds of a step with so many, in rising order of tokens."""

_SLACK = 1.1


def limit_ms(max_ms: float, least_ms: float) -> float:
    """The limit of a step in which even the fewest prompt tokens take `least_ms`. Where that is
    more than max_ms, more tokens at nearly the same cost are better than many such steps."""
    return max(max_ms, _SLACK * least_ms)


@dataclass(frozen=True, slots=True)
class StepBound:
    """How many prompt tokens a step may take in which somebody decodes."""

    max_ms: float  # of such a step
    # (rows that decode, rising; prompt tokens that such a step takes within max_ms).
    knots: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, max_ms: float, curves: Mapping[int, Curve]) -> StepBound:
        """curves: what was measured, by the number of rows that decode; one at least."""
        assert curves, "no step was measured"
        return cls(
            max_ms, tuple((rows, _tokens_within(max_ms, curves[rows])) for rows in sorted(curves))
        )

    def most_prompt_tokens(self, num_rows: int) -> int:
        """Whole blocks beside `num_rows` that decode: `CHUNK_SIZES[0]` at least, so that prompts
        come to an end whatever a step takes."""
        most = int(_between(self.knots, num_rows))
        return max(CHUNK_SIZES[0], most // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK)


def _tokens_within(max_ms: float, curve: Curve) -> float:
    """Where a curve reaches its `limit_ms`, by its mean slope after the last point."""
    first, first_ms = last, last_ms = curve[0]
    most_ms = limit_ms(max_ms, first_ms)
    for tokens, ms in curve:
        if ms > most_ms:
            return last + (most_ms - last_ms) / (ms - last_ms) * (tokens - last)
        last, last_ms = tokens, max(ms, last_ms)  # more tokens never take less time
    slope = (last_ms - first_ms) / (last - first) if last_ms > first_ms else last_ms / last
    return last + (most_ms - last_ms) / slope


def _between(knots: tuple[tuple[int, float], ...], at: int) -> float:
    """Linear between knots, constant outside."""
    place = bisect_left(knots, (at, 0.0))
    if place == 0:
        return knots[0][1]
    if place == len(knots):
        return knots[-1][1]
    (left, low), (right, high) = knots[place - 1], knots[place]
    return low + (high - low) * (at - left) / (right - left)
