"""Milliseconds of vision with its projector, in FP8 and bfloat16, after a pause and without."""

from __future__ import annotations

from typing import Any

from bench.plots.panels import Bar, Panel

PHASES = {
    "vision FP8": "FP8,\nafter a pause",
    "vision FP8, busy": "FP8,\nbusy",
    "vision bfloat16": "bfloat16,\nafter a pause",
    "vision bfloat16, busy": "bfloat16,\nbusy",
}


def panels(values: dict[str, Any]) -> list[Panel]:
    """One for each number of tiles."""
    rows = [row for row in values["rows"] if row["phase"] in PHASES]
    order = list(PHASES)
    found = []
    for num_tiles in sorted({row["batch_size"] for row in rows}):
        bars = {
            (order.index(row["phase"]), PHASES[row["phase"]]): Bar.of_row(row)
            for row in rows
            if row["batch_size"] == num_tiles
        }
        title = f"vision and projector, tiles: {num_tiles}"
        found.append(Panel(title, "precision", "ms", "%.1f", bars))
    return found
