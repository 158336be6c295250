"""The loop that all who ask a runner share, from one thread or from many.

Who asks alone takes the loop's turns itself: no thread is started, and no token is handed from
thread to thread. With the first question that comes while another one is open, a thread of the
runner's own takes the turns from then on, and another one encodes. So what libraries keep by thread
(cuBLAS's workspaces, OpenMP's threads) is there once, however many threads ask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

from nvlm.program.errors import UserError
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.intake import Intake
from runtime.serving.loop import Loop
from runtime.serving.stages import Stages
from runtime.serving.ticket import Ticket


class SharedLoop:
    """Opens a `Loop` for the first `Asker` and closes it after the last. Any thread may ask."""

    def __init__(self) -> None:
        self._turns = threading.Lock()  # held during a turn, and taken before `_changed`
        # Of the rest. Reentrant: the garbage collector may close a forgotten stream inside.
        self._changed = threading.Condition(threading.RLock())
        self._loop: Loop | None = None
        self._askers: set[Asker] = set()  # of `_loop`
        self._is_joining = False  # an asker, which is not yet in `_askers`
        self._is_closed = False
        # The runner's own threads, one each, from the second asker on:
        self._stepping: ThreadPoolExecutor | None = None
        self._encoding: ThreadPoolExecutor | None = None
        self._stepping_thread: int | None = None
        self._is_leading = False  # whether that thread takes turns, or is about to

    def ask(self, stages: Stages, *, max_open: int, num_preparing: int = 0) -> Asker:
        """A context to ask `stages` in, the same each time. max_open: of the whole loop's requests,
        for its first asker. num_preparing: threads that decode this asker's pictures beside it.

        Raises `UserError` once the runner is closed, and where a server has its decoder.
        """
        with self._changed:
            if self._is_closed:
                raise UserError("this runner is closed; open the engine again")
            self._is_joining = True
            try:
                if self._loop is None:
                    self._loop = Loop(stages, max_open=max_open)
                asker = Asker(self, self._loop, num_preparing)
                self._askers.add(asker)
            finally:
                self._is_joining = False
            if len(self._askers) > 1 and self._stepping is None:
                self._stepping = ThreadPoolExecutor(1, "nvlm-decoder")
                self._encoding = ThreadPoolExecutor(1, "nvlm-encoder")
            self.lead()
            self._changed.notify_all()
            return asker

    def lead(self) -> None:
        """Has the runner's own thread, if there is one, take turns until no request is open."""
        with self._changed:
            if self._stepping is not None and not self._is_leading:
                self._stepping.submit(self._take_turns)
                self._is_leading = True

    def take_turn(self, loop: Loop) -> bool:
        """One turn by an asker that is alone; False where the runner's own thread takes them."""
        with self._turns:
            if self._stepping is not None:
                return False
            self._turn(loop)
            return True

    def encode(self, stages: Stages, ticket: Ticket) -> None:
        """As `stages.encode`, by the runner's own thread if there is one."""
        if self._encoding is not None and ticket.images:
            self._encoding.submit(stages.encode, ticket).result()
        else:
            stages.encode(ticket)

    def leave(self, asker: Asker) -> None:
        """Ends an asker, whose open requests are cancelled. After the last one the decoder is free
        for another loop."""
        with self._changed:
            self._askers.discard(asker)
            self._close_if_left()
            if threading.get_ident() != self._stepping_thread:
                self._changed.wait_for(lambda: self._askers or not self._is_leading)

    def close(self) -> None:
        """Ends every open request with a `UserError`, and the runner's own threads."""
        with self._changed:
            self._is_closed = True
            loop = self._loop
        if loop is not None:
            loop.stop(UserError("this runner was closed before the answer was whole"))
            with self._turns, self._changed:
                self._close(loop)
        for own in (self._stepping, self._encoding):
            if own is not None:
                own.shutdown()

    def _take_turns(self) -> None:
        """The work of the runner's own thread. What breaks is raised to those who ask."""
        self._stepping_thread = threading.get_ident()
        while (loop := self._loop_to_turn()) is not None:
            try:
                with self._turns:
                    self._turn(loop)
            except Exception:
                continue

    def _loop_to_turn(self) -> Loop | None:
        with self._changed:
            if self._loop is not None and self._loop.num_open:
                return self._loop
            self._is_leading = False
            self._close_if_left()
            self._changed.notify_all()
            return None

    def _turn(self, loop: Loop) -> None:
        """What breaks the loop itself, an interrupt of its thread too, ends every request of it:
        a step may have been lost half way. The next asker gets another loop."""
        try:
            loop.turn()
        except BaseException as error:
            failure = error
            if not isinstance(failure, Exception):
                failure = RuntimeError("the thread that took the steps was interrupted; ask again")
            with self._changed:
                loop.stop(failure)
                self._close(loop)
            raise

    def _close_if_left(self) -> None:
        is_left = not (self._askers or self._is_joining or self._is_leading)
        if self._loop is not None and is_left:
            self._close(self._loop)

    def _close(self, loop: Loop) -> None:
        if self._loop is loop:
            loop.close()
            self._loop, self._askers = None, set()


class Asker:
    """One question, stream or batch in the shared loop; a context that cancels what is left.

    One thread at a time uses it.
    """

    def __init__(self, shared: SharedLoop, loop: Loop, num_preparing: int) -> None:
        self._shared, self._loop = shared, loop
        self._inbox: SimpleQueue[tuple[int, Answer]] = SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._intake = Intake(
            loop.stages, num_preparing, loop.deliver, partial(shared.encode, loop.stages)
        )

    @property
    def num_open(self) -> int:
        """Requests whose end was not heard."""
        return len(self._tickets)

    def submit(self, request: GenerationRequest, index: int = 0, *, in_pieces: bool) -> None:
        """Asks, as soon as the loop has a place. `in_pieces`: hears more than the end."""

        def listen(answer: Answer) -> None:
            if in_pieces or answer.is_last:
                self._inbox.put((index, answer))

        ticket = self._loop.accept(request, listen, waits=True)
        self._tickets[index] = ticket
        self._shared.lead()
        self._intake.put(ticket)

    def hear(self) -> Iterator[tuple[int, Answer]]:
        """What was answered, with the request's index. Takes one turn of the loop first; where the
        runner's own thread takes them, waits for an answer. Needs an open request."""
        assert self._tickets, "nothing was asked"
        if not self._shared.take_turn(self._loop):
            yield self._heard(*self._inbox.get())
        while not self._inbox.empty():
            yield self._heard(*self._inbox.get())

    def _heard(self, index: int, answer: Answer) -> tuple[int, Answer]:
        if answer.is_last:
            del self._tickets[index]
        return index, answer

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        for ticket in self._tickets.values():
            self._loop.cancel(ticket)
        self._shared.leave(self)
        self._intake.close()
