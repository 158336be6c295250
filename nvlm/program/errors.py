"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave us, told in one sentence.

    The message says what was found, what was expected and which flag or command mends it. Entry
    scripts print it on one line and exit with code 2. A mistake of ours is an `assert` or any
    other exception and keeps its traceback.
    """
