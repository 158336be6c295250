"""A replica's serve.py: a process of its own, with its ranks, on a free port of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

_READY = re.compile(r"^ready: http://127\.0\.0\.1:(\d+)/v1 ")
_ROOT = Path(__file__).resolve().parents[2]
_NUM_LINES_KEPT = 20
_END_S = 20.0


class ServerProcess:
    """Started with the constructor; it ends with this process, however that one ends.

    command: serve.py with its flags, under mpirun where it has several ranks. Its log goes
    to stderr. Any thread may call the methods.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.port: int | None = None  # once it is ready
        self._last_lines: deque[str] = deque(maxlen=_NUM_LINES_KEPT)
        self._is_ready_or_over = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "frontends.ray_serve.tied", *command],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        threading.Thread(target=self._read, name="nvlm-server-log", daemon=True).start()

    def wait_until_ready(self) -> int:
        """Its port. Raises `RuntimeError` with the end of its log where it ended before."""
        self._is_ready_or_over.wait()
        if self.port is None:
            raise RuntimeError(
                f"serve.py ended with code {self._process.wait()}: " + "\n".join(self._last_lines)
            )
        return self.port

    def wait(self) -> int:
        """Its exit code."""
        return self._process.wait()

    def close(self) -> None:
        """Ends it, and waits until its GPUs are free."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if self.port is None:
                self._last_lines.append(line.rstrip())
            if ready := _READY.match(line):
                self.port = int(ready[1])
                self._is_ready_or_over.set()
            sys.stderr.write(line)
        self._is_ready_or_over.set()
