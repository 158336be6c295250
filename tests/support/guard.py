"""Fails a test that starts a process or interprets a kernel without saying so.

`make check` leaves out tests by their markers (see MARKS in tests/conftest.py). Every run holds
every test to them, so that a forgotten marker fails at once and the set stays fast.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from multiprocessing.process import BaseProcess

import pytest

_PROCESS_EVENTS = {
    *("subprocess.Popen", "os.system", "os.exec"),
    *("os.fork", "os.forkpty", "os.posix_spawn"),
}

_refused: set[str] = set()
"""The markers that the running test does not have. Between tests everything is allowed."""


@contextmanager
def guarding(item: pytest.Item) -> Iterator[None]:
    """Holds a test and its fixtures to the markers `process` and `kernels`."""
    _refused.update(m for m in ("process", "kernels") if item.get_closest_marker(m) is None)
    try:
        yield
    finally:
        _refused.clear()


def install() -> None:
    """Watches this interpreter for good. Programs that tests start are not watched."""
    sys.addaudithook(_audit)
    # It may ask a server to fork, which no event shows.
    _watch(BaseProcess, "start", "process", "starts a process")
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    _watch(GridExecutor, "__call__", "kernels", "interprets a Triton kernel")


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _refused and event in _PROCESS_EVENTS:
        _check("process", f"starts a process ({event} {str(arguments[:1])[:60]})")


def _watch(owner: type, name: str, marker: str, deed: str) -> None:
    original = getattr(owner, name)

    @wraps(original)
    def watched(*arguments: object, **keywords: object) -> object:
        _check(marker, deed)
        return original(*arguments, **keywords)

    setattr(owner, name, watched)


def _check(marker: str, deed: str) -> None:
    if marker in _refused:
        pytest.fail(
            f"this test {deed}: mark it `{marker}`, with @pytest.mark.{marker} or by a row of"
            " MARKS in tests/conftest.py"
        )
