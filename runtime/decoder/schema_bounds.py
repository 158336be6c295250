"""Bounds of numbers that llguidance 1.9.1 takes and does not hold answers to, by the name of their
keyword. tests/decoder/test_schema_bounds.py measures both kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_LOWER = ("minimum", "exclusiveMinimum")
_UPPER = ("maximum", "exclusiveMaximum")
_OPPOSITE = {"exclusiveMinimum": (_UPPER, 1), "exclusiveMaximum": (_LOWER, -1)}
_MERGED = ("$ref", "anyOf", "oneOf")
"""Beside these a schema's bounds count for what they hold, as they do between parts of allOf."""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_DATA = ("enum", "const", "default", "examples")
_MOST_DIGITS = 15


def faulty_bound(schema: dict[str, Any]) -> tuple[str, str] | None:
    """The keyword of a bound that would not be held, and what of it; None where all are."""
    own = [(each, _bounds(each)) for each in schemas(schema)]
    for _, bounds in own:
        for name, value in bounds:
            if abs(value) >= 2**53 or float(f"{value:.{_MOST_DIGITS}g}") != value:
                return name, f"{value}, of more than {_MOST_DIGITS} digits"
    groups = [bounds for each, bounds in own if _may_be_number(each)]
    is_merged = any("allOf" in each or (b and each.keys() & {*_MERGED}) for each, b in own)
    if is_merged:
        groups.append([bound for _, bounds in own for bound in bounds])
    for group in groups:
        for name, value in group:
            opposite, step = _OPPOSITE.get(name, ((), 0))
            near = [
                other for key, other in group if key in opposite and _within(value, other, step)
            ]
            if near and value == int(value):
                return name, f"{value}, with another bound of {near[0]} less than 1 from it"
    return None


def _within(bound: float, other: float, step: int) -> bool:
    return 0 < (other - bound) * step < 1


def _bounds(schema: dict[str, Any]) -> list[tuple[str, float]]:
    return [
        (name, schema[name])
        for name in (*_LOWER, *_UPPER)
        if isinstance(schema.get(name), (int, float)) and not isinstance(schema[name], bool)
    ]


def _may_be_number(schema: dict[str, Any]) -> bool:
    types = schema.get("type", "number")
    return "number" in (types if isinstance(types, list) else [types])


def schemas(value: Any) -> Iterator[dict[str, Any]]:
    """A schema and every one below it."""
    if isinstance(value, list):
        for item in value:
            yield from schemas(item)
    if not isinstance(value, dict):
        return
    yield value
    for name, child in value.items():
        if name in _OF_NAMES and isinstance(child, dict):
            for schema in child.values():
                yield from schemas(schema)
        elif name not in _OF_DATA:
            yield from schemas(child)
