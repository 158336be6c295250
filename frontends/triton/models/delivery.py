"""Sends answers to Triton from a thread of its own, so that no client holds up the decoder."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from frontends.triton.models.metrics import MetricsExporter
from frontends.triton.models.replies import (
    CancelledError,
    error_response,
    log_end,
    response_of,
    send_last,
)
from runtime.requests.types import Answer
from runtime.serving.part import Part
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket

logger = logging.getLogger(__name__)

_TICK_S = 0.05  # how soon a cancelled client is noticed
_TICKS_PER_EXPORT = 5
_CLOSE_TIMEOUT_S = 1.0
_FLUSH_TIMEOUT_S = 2.0
_SEND_LIMIT_S = 30.0  # a response is handed to Triton in shared memory, which waits for no client


@dataclass(eq=False, slots=True)
class Client:
    """Where the answers of one request go."""

    name: str  # its id in the log: the client's own in quotes, or a number
    sender: Any  # Triton's InferenceResponseSender
    streams: bool  # wants each piece, not the whole alone
    outputs: frozenset[str]  # names of the tensors it asked for
    is_done: bool = False  # its last response was sent


class Delivery:
    """`put` and `watch` may be called by any thread; whatever they hand over goes out in order."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._exporter = MetricsExporter()
        self._queue: SimpleQueue[tuple[Client, Answer | Ticket] | threading.Event | None]
        self._queue = SimpleQueue()
        self._tickets: dict[Client, Ticket] = {}
        self._next_tick, self._num_ticks = 0.0, 0
        self.part = Part("the thread that sends the answers")
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        self.part.thread = self._thread

    def put(self, client: Client, answer: Answer) -> None:
        if client.streams or answer.is_last:
            self._queue.put((client, answer))

    def watch(self, client: Client, ticket: Ticket) -> None:
        """Cancels the request when its client goes away, from now on."""
        self._queue.put((client, ticket))

    def flush(self) -> None:
        """Returns when what was handed over before has gone out, or nothing goes out any more."""
        has_gone_out = threading.Event()
        self._queue.put(has_gone_out)
        has_gone_out.wait(_FLUSH_TIMEOUT_S)

    def close(self) -> None:
        """Ends the thread. Triton answers no metrics and no `is_cancelled` any more while a model
        is finalized, so one that waits for such an answer is not joined."""
        self._queue.put(None)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _loop(self) -> None:
        while True:
            item: tuple[Client, Answer | Ticket] | threading.Event | None = None
            self.part.rest()
            with suppress(Empty):
                if (item := self._queue.get(timeout=_TICK_S)) is None:
                    return
            self.part.begin(_SEND_LIMIT_S)
            try:
                if isinstance(item, threading.Event):
                    item.set()
                elif item is not None:
                    self._handle(*item)
                self._tick()
            except Exception:  # one client's trouble is not the others'
                logger.exception("an answer could not be sent")

    def _tick(self) -> None:
        """Now and then, looks for clients that are gone and updates the metrics."""
        if (now := time.monotonic()) < self._next_tick:
            return
        self._next_tick = now + _TICK_S
        self._num_ticks += 1
        self._cancel_those_gone()
        if self._num_ticks % _TICKS_PER_EXPORT == 0:
            self._exporter.export(self._server.samples())

    def _handle(self, client: Client, item: Answer | Ticket) -> None:
        if client.is_done:
            return  # cancelled, or answered before it was watched
        if isinstance(item, Ticket):
            self._tickets[client] = item
            return
        response = response_of(item, client.outputs, whole=not client.streams)
        if item.is_last:
            log_end(client.name, item.error or item.result)
            self._finish(client, response)
        else:
            client.sender.send(response)

    def _cancel_those_gone(self) -> None:
        for client, ticket in list(self._tickets.items()):
            if client.sender.is_cancelled():
                self._server.cancel(ticket)
                log_end(client.name, CancelledError())
                self._finish(client, error_response(CancelledError()))

    def _finish(self, client: Client, response: Any) -> None:
        client.is_done = True
        self._tickets.pop(client, None)
        send_last(client.sender, response)
