"""A line plot as inline SVG: no script, no font, no file besides it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 12, 12, 34

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5588f", "#b08900")
_TEXT = 'font-size="11" fill="currentColor"'

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Axis:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float  # smallest value
    high: float  # largest value
    start: float  # pixel of `low`
    end: float  # pixel of `high`; below `start` for an axis that points up
    is_log: bool = False  # equal factors, not differences, are equally long

    def pixel(self, value: float) -> float:
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.is_log else value

    def ticks(self) -> list[float]:
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            step = max(1, -(-(last - first) // 6))
            powers = [10.0**power for power in range(first, last + 1, step)]
            return [power for power in powers if self.low <= power <= self.high]
        length = (self.high - self.low) or 1.0
        unit = 10.0 ** math.floor(math.log10(length))
        width = unit * next(f for f in (0.2, 0.5, 1.0, 2.0) if length / (f * unit) <= 6)
        numbers = range(math.ceil(self.low / width), math.floor(self.high / width + 1e-9) + 1)
        return [width * number for number in numbers]


def line_plot(
    series: Mapping[str, Points], title: str, y_label: str, *, is_log: bool = False
) -> str:
    """Up to five lines of (layer, value) points, each with a tooltip, both axes with their names,
    and a legend below.

    Attributes rather than classes, so that mail and PDF programs show it as browsers do.
    """
    assert len(series) <= len(_COLOURS), f"{len(series)} lines"
    values = [y for points in series.values() for _, y in points if y > 0 or not is_log]
    layers = [x for points in series.values() for x, _ in points]
    if not values:
        return "<p>nothing to show</p>"
    low, high = (min(values), max(values)) if is_log else (0.0, max(values) * 1.05)
    if is_log:  # whole powers of ten, so that a tick is always seen
        low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    if low == high:
        low, high = (low / 10, high * 10) if is_log else (0.0, 1.0)
    x_axis = _Axis(min(layers), max(layers), _LEFT, WIDTH - _RIGHT)
    y_axis = _Axis(low, high, HEIGHT - _BOTTOM, _TOP, is_log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_axis.ticks():
        y = y_axis.pixel(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        place = f'x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end"'
        parts.append(f"<text {place} {_TEXT}>{tick:g}</text>")
    for tick in x_axis.ticks():
        if tick == round(tick):
            x = x_axis.pixel(tick)
            place = f'x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle"'
            parts.append(f"<text {place} {_TEXT}>{tick:.0f}</text>")
    place = f'x="{WIDTH / 2}" y="{HEIGHT - 2}" text-anchor="middle"'
    parts.append(f"<text {place} {_TEXT}>layer</text>")
    scale = ", log scale" if is_log else ""
    place = f'transform="translate(12 {(HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {place} {_TEXT}>{escape(y_label)}{scale}</text>")
    corner = f"{_LEFT},{_TOP} {_LEFT},{HEIGHT - _BOTTOM} {WIDTH - _RIGHT},{HEIGHT - _BOTTOM}"
    parts.append(f'<polyline class="axes" points="{corner}" fill="none" stroke="currentColor"/>')
    for colour, (name, points) in zip(_COLOURS, series.items(), strict=False):
        where = [(x_axis.pixel(x), y_axis.pixel(y)) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        for (x, y), (layer, value) in zip(where, points, strict=True):
            tip = escape(f"{name}, layer {layer:.0f}: {value:.4g}")
            place = f'cx="{x:.1f}" cy="{y:.1f}" r="2.5"'
            parts.append(f'<circle {place} fill="{colour}"><title>{tip}</title></circle>')
    parts.append("</svg>")
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in zip(_COLOURS, series, strict=False)
    )
    return f'{"".join(parts)}<div class="legend">{legend}</div>'
