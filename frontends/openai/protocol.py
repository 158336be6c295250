"""uvicorn's HTTP/1.1 with two timeouts that uvicorn has not: for headers that never end, and for a
client that never reads its answer."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    header: float = 15.0  # until a request's headers are whole
    write: float = 60.0  # while the client takes nothing of what is sent
    keep_alive: float = 75.0  # longer than a proxy's, which would else send into a closed one


class TimedProtocol(H11Protocol):
    """One connection. A subclass of `timed` has its timeouts."""

    timeouts = Timeouts()

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None:  # a peer whose machine is gone is noticed in the end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        if not self._is_answering and self._header_timer is None:
            self._await_headers()
        super().data_received(data)
        if self._is_answering:
            self._end_header_timer()
        elif self._is_between_requests and self.timeout_keep_alive_task is None:
            # The rest of a body that was refused before it came.
            self._end_header_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.timeouts.write, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_header_timer()
        self._end_write_timer()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered over HTTP/1.1, and the log is not a client's to fill."""

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_between_requests(self) -> bool:
        """Whether the last request is over, and nothing of another one has come."""
        return self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]

    def _end_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _end_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _await_headers(self) -> None:
        self._header_timer = self.loop.call_later(self.timeouts.header, self.transport.abort)


def timed(timeouts: Timeouts) -> type[TimedProtocol]:
    """The protocol with these timeouts, which uvicorn makes one of for each connection."""
    return type("TimedProtocol", (TimedProtocol,), {"timeouts": timeouts})
