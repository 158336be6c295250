"""What one kind of input is: how cases are made, and what reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nvlm.program.errors import UserError, shortened

MOST_CHARACTERS = 1500
"""Longest message: it quotes values, and is no copy of them."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A kind with its seeds made. `read` raises `UserError` for what it refuses and an assertion
    for what it should have; anything else that it raises is a fault of ours."""

    cases: st.SearchStrategy[Any]
    read: Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """`open` makes seeds in an empty folder."""

    name: str
    open: Callable[[Path], Opened]


def is_refused(opened: Opened, case: Any) -> bool:
    """Whether the case was refused in a sentence; raises what else happens."""
    try:
        opened.read(case)
    except UserError as error:
        length = len(shortened(str(error)))
        assert length <= MOST_CHARACTERS, f"a message of {length} characters"
        return True
    return False
