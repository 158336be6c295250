"""The other end of what a model's process says of itself (models/heartbeat.py).

Triton runs on without a model's process, and its health stays good. So each process holds a pipe
with a name open, for writing: the system closes it with the process, and a line a second says that
it is not stopped.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nvlm.program.signal_names import how_a_zombie_ended

HANG_AFTER_S = 60.0  # no library of ours keeps a process's threads from running for so long
_ZOMBIE_S = 0.5  # between the closing of the pipe and the end of the process
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class End:
    """Why a server must end."""

    reason: str  # a sentence for the log
    is_mistake: bool = False  # the user's, which starting again does not fix
    is_answered: bool = False  # whatever was in flight was answered with it


class ModelPipe:
    """Made before the model's process is, in a folder that is there."""

    def __init__(self, folder: Path, model: str, hang_after_s: float = HANG_AFTER_S) -> None:
        self.path = folder / f"pipe_{model}"
        self._model, self._hang_after_s = model, hang_after_s
        os.mkfifo(self.path, 0o600)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self._received = b""
        self._pid: int | None = None  # pid of the process that writes, once it has sent it
        self._has_left = False
        self._silent_s = 0.0

    def close(self) -> None:
        os.close(self._fd)

    def look(self, since_last_s: float) -> End | None:
        """Why the process is of no more use, if it is. since_last_s: between two looks; what a
        sleeping machine adds to it is not counted against the process."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return self._hears_nothing(since_last_s)
        if not data:
            return self._is_closed()
        self._silent_s = 0.0
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            values = json.loads(line)
            self._pid = values.get("pid", self._pid)
            self._has_left |= "leaves" in values
            if "end" in values:
                return End(values["end"], values["is_mistake"], is_answered=True)
        return None

    def _hears_nothing(self, since_last_s: float) -> End | None:
        self._silent_s += since_last_s
        if self._silent_s < self._hang_after_s:
            return None
        return End(
            f"the process of model {self._model} has given no sign of life for "
            f"{self._hang_after_s:.0f} s: it is stopped, or a library of it hangs"
        )

    def _is_closed(self) -> End | None:
        if self._pid is None or self._has_left:
            return None  # it did not begin, or it ends as it should
        return End(f"the process of model {self._model} was ended {self._how_it_ended()}")

    def _how_it_ended(self) -> str:
        """Triton, whose child it is, leaves it a zombie."""
        end = time.monotonic() + _ZOMBIE_S
        while time.monotonic() < end:
            with suppress(OSError):
                ended = how_a_zombie_ended(Path(f"/proc/{self._pid}/stat").read_text())
                if ended is not None:
                    return ended
            time.sleep(0.01)
        return "by a signal that cannot be read any more"
