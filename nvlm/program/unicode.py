"""Text that UTF-8 can write.

A Python string may hold half a character, as JSON's "\\ud800" gives it. Libraries that take UTF-8
fail on it in words of their own.
"""

from __future__ import annotations

from nvlm.program.errors import UserError, shown


def require_unicode(text: str, name: str) -> str:
    """Returns `text`. Raises `UserError`, which begins with `name`, where it holds half a character
    (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not valid Unicode: it has half a character, "
            f"{shown(text[error.start : error.end])}, at {error.start}; give it as UTF-8"
        ) from None
    return text
