"""Bars of several results side by side, each with a dash at what its run's ceilings allow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "nvlm"  # the same results give the same bytes

Tick = tuple[int, str]
"""Place in the order, and what stands below the axis."""


@dataclass(frozen=True, slots=True)
class Bar:
    """ceiling: the height that the run's own ceilings allow."""

    height: float
    ceiling: float

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Bar:
        """Milliseconds of a result's row (bench/rows.py)."""
        return cls(row["ms"], row["ms"] * row["share"])


@dataclass(frozen=True, slots=True)
class Panel:
    """One result's part of a plot; panels of one title share their axes."""

    title: str
    xlabel: str
    ylabel: str
    number: str  # format of a height, as of %
    bars: dict[Tick, Bar]


def draw(results: dict[str, list[Panel]]) -> Figure:
    titles = list(dict.fromkeys(panel.title for panels in results.values() for panel in panels))
    num_columns = min(2, len(titles))
    num_rows = math.ceil(len(titles) / num_columns)
    figure = Figure(figsize=(4.5 * num_columns, 3.8 * num_rows), layout="constrained")
    every_axes = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for title, axes in zip(titles, every_axes, strict=False):
        found = {
            name: (f"C{i}", panel)
            for i, (name, panels) in enumerate(results.items())
            for panel in panels
            if panel.title == title
        }
        _draw_panel(axes, found)
    for axes in every_axes:  # of the last row, where it is not full
        axes.remove()
    return figure


def _draw_panel(axes: Axes, found: dict[str, tuple[str, Panel]]) -> None:
    """found: color and panel by the result's name."""
    every = sorted({tick for _, panel in found.values() for tick in panel.bars})
    width = 0.8 / len(found)
    for i, (name, (color, panel)) in enumerate(found.items()):
        places = [every.index(tick) + (i + 0.5) * width - 0.4 for tick in panel.bars]
        heights = [bar.height for bar in panel.bars.values()]
        bars = axes.bar(places, heights, width, label=name, color=color)
        axes.bar_label(bars, fmt=panel.number, fontsize="x-small", padding=1)
        left, right = ([place + side * width for place in places] for side in (-0.45, 0.45))
        ceilings = [bar.ceiling for bar in panel.bars.values()]
        is_last = i == len(found) - 1
        label = "at the run's measured ceiling" if is_last else ""
        axes.hlines(ceilings, left, right, "black", "dashed", label=label)
    axes.set_xlabel(panel.xlabel)
    axes.set_xticks(range(len(every)), [text for _, text in every])
    if len(every) == 1:
        axes.set_xlim(-1, 1)
    axes.set(title=panel.title, ylabel=panel.ylabel)
    axes.set_ylim(0, (1.15 + 0.1 * len(found)) * axes.get_ylim()[1])  # the legend is above
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left")
