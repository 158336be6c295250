"""Milliseconds per layer: of decode steps by batch size, and of prompts by length.

A file of one number of layers has no slope; its steps are divided by their layers, head and
sampling included.
"""

from __future__ import annotations

from typing import Any

from bench.plots.panels import Bar, Panel, Tick

Point = tuple[int, int]
"""Batch size, context or prompt."""


def panels(values: dict[str, Any]) -> list[Panel]:
    found = []
    for phase in ("decode", "prefill"):
        measured = points(values, phase)
        if not measured:
            continue
        if phase == "decode":
            context = min(num_tokens for _, num_tokens in measured)
            xlabel = f"batch size, at {context:,} tokens of context"
        else:
            xlabel = "tokens of the prompt"
        bars: dict[Tick, Bar] = {}
        for point, bar in measured.items():
            number = point[0] if phase == "decode" else point[1]
            bars[number, f"{number:,}"] = bar
        found.append(Panel(phase, xlabel, "ms per layer", "%.3f", bars))
    return found


def points(values: dict[str, Any], phase: str) -> dict[Point, Bar]:
    """A layer's. The ceiling is that of the rows, so of what their program's layers hold."""
    rows: dict[Point, list[tuple[int, Bar]]] = {}
    for row in values["rows"]:
        if row["phase"] == phase:
            depths = rows.setdefault((row["batch_size"], row["num_tokens"]), [])
            depths.append((row["num_layers"], Bar.of_row(row)))
    return {point: _of_a_layer(depths) for point, depths in rows.items()}


def _of_a_layer(depths: list[tuple[int, Bar]]) -> Bar:
    (low, less), (high, more) = depths[0], depths[-1]
    if low == high:
        return Bar(less.height / low, less.ceiling / low)
    return Bar(
        (more.height - less.height) / (high - low), (more.ceiling - less.ceiling) / (high - low)
    )
