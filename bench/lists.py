"""Flags that take several numbers with commas between."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError


def counts(text: str) -> list[int]:
    """Whole numbers from 1."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentTypeError(f"{text!r}: expected whole numbers from 1, as in 1,8,64")
    return [int(part) for part in parts]


def amounts(text: str) -> list[float]:
    """Numbers from 0."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(0.0 <= each < math.inf for each in found):
        raise ArgumentTypeError(f"{text!r}: expected numbers from 0, as in 0,0.5,2")
    return found
