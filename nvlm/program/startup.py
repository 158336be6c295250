"""What a program's start is spent on: a line of its log for each phase, where `show` was called.

`start-up: vision weights took 1.25 s`. A phase is logged where it happens; phases do not nest.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger("startup")
_TOOK = re.compile(r"^start-up: (.*) took ([\d.]+) s$", re.MULTILINE)


def show() -> None:
    """Has phases logged from now on. Servers call it; the answer of run.py is all it says."""
    _log.setLevel(logging.INFO)


@contextmanager
def phase(name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    took(name, time.perf_counter() - begun)


def took(name: str, seconds: float) -> None:
    _log.info("start-up: %s took %.2f s", name, seconds)


def spent(log: str) -> dict[str, float]:
    """Seconds of each phase that a log has, in order."""
    return {name: float(seconds) for name, seconds in _TOOK.findall(log)}


def process_age_s() -> float:
    """How long ago this process was started, to 10 ms; proc(5), field 22."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
