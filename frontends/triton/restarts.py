"""How often a server is started again: what dies soon after each start is not healed by another."""

from __future__ import annotations

import time
from collections.abc import Callable

MOST = 3
WITHIN_S = 600.0


class Restarts:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: list[float] = []

    def count(self) -> str | None:
        """Counts another start; why there should be none, where there were too many."""
        now = self._clock()
        self._times = [then for then in self._times if now - then < WITHIN_S]
        if len(self._times) >= MOST:
            return (
                f"that was start {MOST + 1} within {WITHIN_S / 60:.0f} minutes, and another one "
                "would not help"
            )
        self._times.append(now)
        return None
