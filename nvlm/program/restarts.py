"""How often a server is started again: what dies soon after each start is not healed by another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from nvlm.program.errors import PartDiedError

MOST = 3
WITHIN_S = 600.0


class Restarts:
    """Counts the starts of one server. clock: seconds, of which only differences count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: list[float] = []

    def again(self, reason: str, *notes: str) -> None:
        """Counts another start, and says on stderr why there is one: `reason`, then `notes`.

        Raises `PartDiedError` where there were too many.
        """
        now = self._clock()
        self._times = [then for then in self._times if now - then < WITHIN_S]
        if len(self._times) >= MOST:
            refusal = (
                f"that was start {MOST + 1} within {WITHIN_S / 60:.0f} minutes, and another one "
                "would not help"
            )
            raise PartDiedError("; ".join((reason, refusal, *notes)))
        self._times.append(now)
        print("starting again:", "; ".join((reason, *notes)), file=sys.stderr, flush=True)
