"""Watches a server's threads, and reports each that is dead or hangs once.

Dead ones are seen at the next look. One that hangs has made no progress in as many looks as its
limit has. Looks are counted, not seconds: where the machine sleeps, or is too busy to look, no time
passes, and no clock that jumps matters.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nvlm.program.errors import PartDiedError, UserError
from runtime.serving.part import Part

logger = logging.getLogger(__name__)

LOOK_S = 1.0


@dataclass(slots=True)
class _Seen:
    num_beats: int = -1  # of the part at the last look; -1: never looked
    num_looks: int = 0  # without progress


class Watch:
    """Looks at `parts`, which may grow, from a thread of its own until one has ended or `close`.

    on_end: hears why, as a `UserError` for what the user did and a `PartDiedError` for the rest.
    on_look: is called at each look at which all parts are well. hang_after_s: instead of every
    part's own limit.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        on_end: Callable[[Exception], None],
        on_look: Callable[[], None] = lambda: None,
        *,
        hang_after_s: float | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        self._parts, self._on_end, self._on_look = parts, on_end, on_look
        self._hang_after_s, self._look_s = hang_after_s, look_s
        self._seen: dict[Part, _Seen] = {}
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nvlm-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Safe to call from `on_end`, too."""
        self._is_closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def look(self) -> Exception | None:
        """Why the server must end, if it must."""
        for part in tuple(self._parts):
            if part.thread is not None and not part.thread.is_alive():
                return died(part)
            if self._hangs(part):
                _log_place(part)
                return PartDiedError(
                    f"{part.name} has made no progress for {self._limit_s(part):.0f} s, which its "
                    "work never takes"
                )
        return None

    def _limit_s(self, part: Part) -> float:
        return part.limit_s if self._hang_after_s is None else self._hang_after_s

    def _hangs(self, part: Part) -> bool:
        seen = self._seen.setdefault(part, _Seen())
        if not part.is_at_work or part.num_beats != seen.num_beats:
            seen.num_beats, seen.num_looks = part.num_beats, 0
            return False
        seen.num_looks += 1
        return seen.num_looks >= math.ceil(self._limit_s(part) / self._look_s)

    def _run(self) -> None:
        while not self._is_closed.wait(self._look_s):
            if (error := self.look()) is not None:
                if not self._is_closed.is_set():
                    logger.error("%s", error)
                    self._on_end(error)
                return
            self._on_look()


def died(part: Part) -> Exception:
    """The error that reports a part whose thread has ended, or is about to."""
    if isinstance(part.error, UserError):
        return part.error
    why = "" if part.error is None else f": {type(part.error).__name__}: {part.error}"
    error = PartDiedError(f"{part.name} has ended{why}")
    error.__cause__ = part.error
    return error


def _log_place(part: Part) -> None:
    """Logs where the thread of `part` stands, for whoever has to find out why."""
    ident = None if part.thread is None else part.thread.ident
    frame = None if ident is None else sys._current_frames().get(ident)
    if frame is not None:
        place = "".join(traceback.format_stack(frame))
        logger.error("%s hangs here:\n%s", part.name, place)
