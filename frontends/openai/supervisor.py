"""serve.py --restart: the server is a process of its own, which is started again where it dies.

The supervisor holds the socket, so the port stays the same and open: while nobody answers,
connections wait. It loads no engine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from types import FrameType

from frontends.openai.listener import INHERITED, open_listener
from nvlm.program.child import ends_with_us
from nvlm.program.command_line import EXIT_PART_DIED
from nvlm.program.restarts import Restarts
from nvlm.program.signal_names import how_it_ended


def is_supervised() -> bool:
    """Whether this process is a supervisor's."""
    return INHERITED in os.environ


def supervise(host: str, port: int) -> int:
    """Starts this program again as a server, as often as it dies; the exit code of the last one.

    A server that ends with another code than `EXIT_PART_DIED` is not healed by another start: it
    was stopped, or met a mistake. Raises `PartDiedError` after too many deaths, and `UserError`
    where the address cannot be listened on.
    """
    restarts = Restarts()
    with open_listener(host, port) as listener, _Forwarding() as forwarding:
        while True:
            code = forwarding.run(listener)
            has_died = code == EXIT_PART_DIED or code < 0
            if forwarding.is_stopping and code < 0:
                raise KeyboardInterrupt  # a signal ended it before it listened to signals
            if forwarding.is_stopping or not has_died:
                return code
            restarts.again(f"the server ended {how_it_ended(code)}")


class _Forwarding:
    """Hands signals that end a program to the server, which ends in order."""

    def __init__(self) -> None:
        self.is_stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Forwarding:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup has SIGHUP ignored, and a shell's `&` SIGINT: a server listens to SIGINT still.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def run(self, listener: socket.socket) -> int:
        """One server, in a session of its own: a terminal's Control-C comes here alone. Returns
        its code as `subprocess` gives it."""
        descriptor = listener.fileno()
        self._process = subprocess.Popen(
            ends_with_us([sys.executable, *sys.orig_argv[1:]]),
            env={**os.environ, INHERITED: str(descriptor)},
            pass_fds=(descriptor,),
            start_new_session=True,
        )
        if self.is_stopping:  # since the one before
            self._process.terminate()
        return self._process.wait()

    def _forward(self, number: int, _: FrameType | None) -> None:
        """Control-C as SIGTERM, which means the same to a server: one that is still importing would
        print where it is."""
        self.is_stopping = True
        number = signal.SIGTERM if number == signal.SIGINT else number
        if self._process is not None:
            self._process.send_signal(number)
