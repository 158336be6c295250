"""A file system without locks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable

import pytest

LocksFail = Callable[[int], None]


@pytest.fixture
def locks_fail(monkeypatch: pytest.MonkeyPatch) -> LocksFail:
    """From the call on, flock fails with the error of that number."""

    def fail(number: int) -> None:
        def no_flock(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", no_flock)

    return fail
