"""Cells that hold a Python list are read as Python reads them, and bounded where Python is not."""

from __future__ import annotations

import ast

import pytest

from evaluation.datasets.literal_list import literal_list

CELLS = [
    "[]",
    "['a']",
    "[ 'a', \"it's\" ,]",
    "['$6', '<image 1>', 'a\\nb', 'caf\\u00e9', '']",
    "['a, b]', \"[c\"]",
    "[1, -2.5, 3e4, .5, None, True]",
    "['back\\\\slash', 'quote\\'d']",
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_list_is_read_as_python_reads_it(cell: str) -> None:
    assert literal_list(cell) == [str(value) for value in ast.literal_eval(cell)]


@pytest.mark.parametrize(
    "cell",
    [
        *("", "3", "'a'", "('a',)", "{'a'}", "['a'", "['a' 'b'", "['a',,]", "[a]", "['a'] x"),
        *("[" * 1000, "[" * 1000 + "]" * 1000, "-" * 1000, "[" + "-" * 1000 + "1]"),
        *("[" + "9" * 5000 + "]", "['" + "a" * 100_000, "['\\x']", "[1+2]", "[open('a')]"),
    ],
    ids=lambda cell: f"{cell[:6]}-{len(cell)}",
)
def test_anything_else_is_none(cell: str) -> None:
    assert literal_list(cell) is None
