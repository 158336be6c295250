"""Lists of strings and numbers as Python writes them, which cells of MMMU hold.

Read value by value: Python's own reader of literals overflows its stack on a thousand signs or
brackets.
"""

from __future__ import annotations

import ast
import re

_VALUE = re.compile(
    r"""
    \s*(?:
        (?P<string>'(?:[^'\\\n]|\\.)*' | "(?:[^"\\\n]|\\.)*")
        | (?P<plain>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)? | None | True | False)
    )\s*(?P<end>[,\]])
    """,
    re.VERBOSE | re.DOTALL,
)
_END = re.compile(r"\s*\]$")
_MOST_DIGITS = 100


def literal_list(text: str) -> list[str] | None:
    """The values as text, or None for what is no such list."""
    text = text.strip()
    if not text.startswith("["):
        return None
    place, values = 1, list[str]()
    while _END.match(text, place) is None:
        found = _VALUE.match(text, place)
        if found is None:
            return None
        try:
            values.append(_value(found))
        except (ValueError, SyntaxError):  # an escape that is none
            return None
        place = found.end()
        if found["end"] == "]":
            return values if place == len(text) else None
    return values


def _value(found: re.Match[str]) -> str:
    if found["string"] is not None:
        return str(ast.literal_eval(found["string"]))
    if len(found["plain"]) > _MOST_DIGITS:
        raise ValueError("no number has so many digits")
    return str(ast.literal_eval(found["plain"]))
