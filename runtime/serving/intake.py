"""The way to the decoder: requests are prepared and encoded, beside its steps where that pays."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from itertools import count
from queue import PriorityQueue

from runtime.serving.part import Part
from runtime.serving.stages import Stages
from runtime.serving.ticket import Ticket

logger = logging.getLogger(__name__)

_PREPARE_LIMIT_S = 600.0  # the largest picture that is read takes half a minute on a busy core


class _Queue:
    """Gives the ticket of the smallest priority, of equal ones the first that came. None comes
    after all of them, and ends the thread that reads it."""

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[float, int, Ticket | None]] = PriorityQueue()
        self._number = count()

    def put(self, ticket: Ticket | None) -> None:
        priority = math.inf if ticket is None else ticket.request.priority
        self._queue.put((priority, next(self._number), ticket))

    def get(self) -> Ticket | None:
        return self._queue.get()[2]


class Intake:
    """`put` may be called by any thread. `deliver` gets every ticket back, encoded, or with its
    `error`, or cancelled.

    `num_preparing` threads decode and tile pictures, each one request (and one picture) at a time,
    in the memory that nvlm/inputs/picture_budget.py grants to all together; another prepares
    requests without pictures, which so wait for none; one encodes. Each takes the smallest
    priority first. With 0 there are no threads, and `put` does the work. `encode` replaces the
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
        self._pictures, self._texts, self._to_encode = _Queue(), _Queue(), _Queue()
        self._threads: list[threading.Thread] = []  # that which encodes last
        self.parts: list[Part] = []  # one a thread
        if num_preparing:
            for _ in range(num_preparing):
                self._start("a thread that prepares pictures", self._prepare_loop, self._pictures)
            self._start("the thread that prepares texts", self._prepare_loop, self._texts)
            self._start("the thread that encodes pictures", self._encode_loop)

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

    def _start(self, name: str, work: Callable[..., None], *queues: _Queue) -> None:
        part = Part(name)

        def run() -> None:
            try:
                work(part, *queues)
            except BaseException as error:  # a ticket is lost, and the watch learns why
                logger.exception("%s ended", name)
                part.error = error

        part.thread = threading.Thread(target=run, daemon=True)
        self._threads.append(part.thread)
        self.parts.append(part)
        part.thread.start()

    def _prepare_loop(self, part: Part, queue: _Queue) -> None:
        while (ticket := queue.get()) is not None:
            part.begin(_PREPARE_LIMIT_S)
            _attempt(self._stages.prepare, ticket)
            if ticket.images:
                self._to_encode.put(ticket)
            else:
                _attempt(self._encode, ticket)
                self._deliver(ticket)
            part.rest()

    def _encode_loop(self, part: Part) -> None:
        while (ticket := self._to_encode.get()) is not None:
            part.begin(self._stages.encode_limit_s(ticket))
            _attempt(self._encode, ticket)
            self._deliver(ticket)
            part.rest()


def _attempt(stage: Callable[[Ticket], None], ticket: Ticket) -> None:
    """Does a stage for a request that is still wanted; what it raises ends that request only."""
    if ticket.is_cancelled or ticket.error is not None:
        return
    try:
        stage(ticket)
    except Exception as error:
        ticket.error = error
