"""What a run of phases prints: its rows as they come, and what a layer adds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.rows import FirstPictures, Interactive, Row

Measured = Row | FirstPictures | Interactive


def told(measured: Iterable[Measured]) -> list[Measured]:
    """The rows, printed as they come, then what a layer adds."""
    rows = []
    for row in measured:
        print(row, flush=True)
        rows.append(row)
    for slope in slopes(rows):
        print(
            f"{slope['phase']:<8}batch {slope['batch_size']:<3} {slope['num_tokens']:>5} tokens "
            f"{slope['ms_per_layer']:.4f} ms per layer, {slope['fixed_ms']:.3f} ms fixed"
        )
    return rows


def slopes(measured: list[Measured]) -> list[dict[str, Any]]:
    """Milliseconds per layer between the smallest and the largest number of layers."""
    found, rows = [], [row for row in measured if isinstance(row, Row)]
    for key in dict.fromkeys((row.phase, row.batch_size, row.num_tokens) for row in rows):
        same = [row for row in rows if (row.phase, row.batch_size, row.num_tokens) == key]
        low, high = same[0], same[-1]
        if high.num_layers > low.num_layers:
            slope = (high.ms - low.ms) / (high.num_layers - low.num_layers)
            names = ("phase", "batch_size", "num_tokens")
            fixed = low.ms - slope * low.num_layers
            found.append(
                {**dict(zip(names, key, strict=True)), "ms_per_layer": slope, "fixed_ms": fixed}
            )
    return found
