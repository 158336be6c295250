"""The one exception a user is meant to read."""

from __future__ import annotations

import re

_DATA = re.compile(r"[A-Za-z0-9+/=_\-]{512,}")  # base64: no word or name is so long
_SHOWN_CHARACTERS = 32
_QUOTED_CHARACTERS = 200


def shortened(message: str) -> str:
    """A message without the pictures that someone put where a name belongs, as base64."""
    return _DATA.sub(
        lambda data: f"{data[0][:_SHOWN_CHARACTERS]}... ({len(data[0])} characters)", message
    )


def cut(text: str) -> str:
    """A text as a message quotes it: 200 characters at most."""
    return text if len(text) <= _QUOTED_CHARACTERS else f"{text[: _QUOTED_CHARACTERS - 3]}..."


def shown(value: object) -> str:
    """A value as a message quotes it: as Python writes it, 200 characters at most."""
    try:
        text = shortened(repr(value))
    except (RecursionError, ValueError):  # lists within lists; whole numbers of 4,301 digits
        text = f"a {type(value).__name__} too long to show"
    return cut(text)


class UserError(Exception):
    """A mistake in what the user gave us, described in one sentence.

    The message says what was found, what was expected and which flag or command fixes it. Entry
    scripts print it on one line and exit with code 2. A picture's base64 is never repeated in it.
    A mistake of ours is an `assert` or any other exception and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class PartDiedError(RuntimeError):
    """A part of a server ended or hangs, described in one sentence.

    Nobody's mistake, and the program cannot run without the part: it answers what is in flight
    with this, prints it on one line and exits with code 3. What broke has its traceback in the log.
    """
