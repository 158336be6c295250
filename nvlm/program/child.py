"""A process that ends with the one that starts it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence


def ends_with_us(command: Sequence[str]) -> list[str]:
    """`command` as a process that gets SIGTERM once its parent is gone, even if that was killed.
    Unchanged where setpriv of util-linux is missing."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", *command] if setpriv else list(command)
