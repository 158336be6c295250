"""From the loop's threads to the one that talks HTTP: the pieces of an answer.

A step has news for every request of its batch. They are handed over together, by one wake-up.
"""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType

from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket


class Handover:
    """`put` is called by any thread, the rest by the thread of the event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[Asked, Answer]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def ask(self, server: Server, request: GenerationRequest, *, in_pieces: bool) -> Asked:
        """Submits a request. Raises what `server.submit` raises."""
        self._loop = asyncio.get_running_loop()
        asked = Asked(server)

        def listen(answer: Answer) -> None:
            if in_pieces or answer.is_last:
                self.put(asked, answer)

        asked.ticket = server.submit(request, listen)
        return asked

    def put(self, asked: Asked, answer: Answer) -> None:
        with self._lock:
            self._pending.append((asked, answer))
            is_first = len(self._pending) == 1
        if is_first:
            assert self._loop is not None, "somebody has asked"
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
        for asked, answer in pending:
            asked.take(answer)


class Asked:
    """A request that was accepted; a context that cancels it unless its end was heard."""

    ticket: Ticket

    def __init__(self, server: Server) -> None:
        self._server = server
        self._heard: list[Answer] = []
        self._has_come = asyncio.Event()
        self._is_over = False
        self.has_begun = False  # whether a piece has come: its prompt is prepared

    async def hear(self) -> list[Answer]:
        """The pieces that have come, one at least. Raises what ended the request."""
        await self._has_come.wait()
        self._has_come.clear()
        pieces, self._heard = self._heard, []
        if (error := pieces[-1].error) is not None:
            raise error
        return pieces

    def take(self, answer: Answer) -> None:
        self._heard.append(answer)
        self.has_begun = self.has_begun or answer.error is None
        self._is_over = answer.is_last
        self._has_come.set()

    def __enter__(self) -> Asked:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_over:
            self._server.cancel(self.ticket)
