"""The way to the decoder: requests are prepared and encoded, beside its steps where that pays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from runtime.serving.stages import Stages
from runtime.serving.ticket import Ticket

_Queue = SimpleQueue[Ticket | None]
"""None ends the thread that reads it."""


class Intake:
    """`put` may be called by any thread. `deliver` gets every ticket back, encoded, or with its
    `error`, or cancelled.

    `num_preparing` threads decode and tile pictures, each one request (and one picture) at a time,
    in the memory that nvlm/inputs/picture_budget.py grants to all together; another prepares
    requests without pictures, which so wait for none; one encodes. With 0 there are no threads,
    and `put` does the work. `encode` replaces the
    stages' own.
    """

    def __init__(
        self,
        stages: Stages,
        num_preparing: int,
        deliver: Callable[[Ticket], None],
        encode: Callable[[Ticket], None] | None = None,
    ) -> None:
        self._stages, self._deliver = stages, deliver
        self._encode = encode or stages.encode
        self._num_preparing = num_preparing
        self._pictures: _Queue = SimpleQueue()
        self._texts: _Queue = SimpleQueue()
        self._to_encode: _Queue = SimpleQueue()
        self._threads: list[threading.Thread] = []  # that which encodes last
        if num_preparing:
            self._threads = [
                *(
                    threading.Thread(target=self._prepare_loop, args=(self._pictures,))
                    for _ in range(num_preparing)
                ),
                threading.Thread(target=self._prepare_loop, args=(self._texts,)),
                threading.Thread(target=self._encode_loop),
            ]
        for thread in self._threads:
            thread.start()

    def put(self, ticket: Ticket) -> None:
        if self._threads:
            (self._pictures if ticket.request.num_images else self._texts).put(ticket)
            return
        try:
            _attempt(self._stages.prepare, ticket)
            _attempt(self._encode, ticket)
        except BaseException:  # an interrupted caller: the loop must not wait for its ticket
            ticket.is_cancelled = True
            raise
        finally:
            self._deliver(ticket)

    def close(self) -> None:
        """Waits for the threads. Tickets that are not cancelled are worked off first, and all are
        delivered."""
        for _ in range(self._num_preparing):
            self._pictures.put(None)
        self._texts.put(None)
        for thread in self._threads[:-1]:
            thread.join()
        self._to_encode.put(None)  # only now: nobody prepares for it any more
        for thread in self._threads[-1:]:
            thread.join()

    def _prepare_loop(self, queue: _Queue) -> None:
        while (ticket := queue.get()) is not None:
            _attempt(self._stages.prepare, ticket)
            if ticket.images:
                self._to_encode.put(ticket)
            else:
                _attempt(self._encode, ticket)
                self._deliver(ticket)

    def _encode_loop(self) -> None:
        while (ticket := self._to_encode.get()) is not None:
            _attempt(self._encode, ticket)
            self._deliver(ticket)


def _attempt(stage: Callable[[Ticket], None], ticket: Ticket) -> None:
    """Does a stage for a request that is still wanted; what it raises ends that request only."""
    if ticket.is_cancelled or ticket.error is not None:
        return
    try:
        stage(ticket)
    except Exception as error:
        ticket.error = error
