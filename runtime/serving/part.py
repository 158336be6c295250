"""What one thread of a server says of itself, for the watch (watch.py)."""

from __future__ import annotations

import threading


class Part:
    """`begin` and `rest` are its thread's; the watch reads the rest.

    Progress is the heartbeat: no clock is read here, so that a step costs two assignments.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread: threading.Thread | None = None  # None: not started, or nobody's own
        self.error: BaseException | None = None  # what ended its thread
        self.num_beats = 0
        self.limit_s = 0.0
        self.is_at_work = False

    def begin(self, limit_s: float) -> None:
        """A piece of work begins, which takes less than `limit_s`; the one before is done."""
        self.limit_s = limit_s
        self.num_beats += 1
        self.is_at_work = True

    @property
    def is_stuck(self) -> bool:
        """Whether the thread of a failed server may never end."""
        return self.is_at_work and self.thread is not None and self.thread.is_alive()

    def rest(self) -> None:
        """Waits for work, as long as there is none."""
        self.is_at_work = False
