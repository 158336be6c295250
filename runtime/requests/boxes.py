"""Grounding answers: `<ref>the cup</ref><box>(12, 34), (567, 890)</box>`.

The paper's examples (arXiv 2409.11402, appendix) print corners as two points; numbers are passed
on as the model wrote them (they look normalised to 0..1000).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(
    r"(?:<ref>(?P<ref>[^<]*)</ref>\s*)?"
    rf"<box>\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*</box>"
)


@dataclass(frozen=True, slots=True)
class Box:
    """A region of an image that an answer names."""

    ref: str | None  # what the answer calls it; None: nothing
    x1: float  # left; all four as the model wrote them, which looks like 0 to 1000
    y1: float  # top
    x2: float  # right
    y2: float  # bottom


def parse_boxes(text: str) -> list[Box]:
    """Every well-formed box of an answer, in order."""
    return [
        Box(match["ref"], *(float(match[group]) for group in range(2, 6)))
        for match in _BOX.finditer(text)
        if all(math.isfinite(float(match[group])) for group in range(2, 6))
    ]
