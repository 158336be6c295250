"""What a model's process says of itself to the program that started Triton (model_pipe.py)."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress

from nvlm.program.errors import UserError

BEAT_S = 1.0


class Heartbeat:
    """A line a second into a pipe, from a thread of its own, until `leave`.

    path: the pipe, which somebody reads. Without one, as in a repository that somebody else
    started, nobody is notified.
    """

    def __init__(self, path: str) -> None:
        self._fd: int | None = None
        with suppress(OSError):  # nobody reads, or there is none
            self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        self._lock = threading.Lock()
        self._has_left = threading.Event()
        self._send({"pid": os.getpid()})
        threading.Thread(target=self._beat, name="nvlm-heartbeat", daemon=True).start()

    def end(self, error: Exception) -> None:
        """Why this process can answer no more."""
        self._send({"end": str(error), "is_mistake": isinstance(error, UserError)})

    def leave(self) -> None:
        """Call this before the process ends in order."""
        self._has_left.set()
        self._send({"leaves": True})

    def _beat(self) -> None:
        while not self._has_left.wait(BEAT_S):
            self._send({})

    def _send(self, values: dict[str, object]) -> None:
        line = json.dumps(values).encode() + b"\n"
        with self._lock, suppress(OSError):  # its reader is gone, or has not read for an hour
            if self._fd is not None:
                os.write(self._fd, line)
