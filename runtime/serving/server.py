"""Many clients, one runner: requests from any thread share the decoder's steps.

A request goes through three kinds of threads: some tile images and tokenise (one only requests
without images, which wait for no picture), one encodes images,
one owns the decoder, so a picture that is decoded or encoded stops nobody's tokens. Requests
without images pass by the encoder. What is accepted and not yet answered is bounded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal

from nvlm.program.errors import UserError
from runtime.decoder.executor import warm_up
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.metrics import Labels, ServingMetrics
from runtime.serving.prepare import PreparedRequest
from runtime.serving.runner import EncodedRequest, Runner

logger = logging.getLogger(__name__)

Outcome = Literal["stop", "length", "refused", "failed", "cancelled", "busy"]


class BusyError(UserError):
    """The server has as many requests as it takes; the same request may succeed later."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One piece of an answer: new text, and with the last piece `result` or `error`."""

    text: str = ""
    result: GenerationResult | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.result is not None or self.error is not None


Listener = Callable[[Answer], None]
"""Called by one of the server's threads, so it must return soon."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request that was accepted."""

    request: GenerationRequest
    listener: Listener
    accepted: float = field(default_factory=time.perf_counter)
    is_cancelled: bool = False
    last_token: float | None = None


class Server:
    """`submit` and `cancel` may be called by any thread.

    A decoder that cannot begin is a `RuntimeError` of the constructor, with its cause.

    At most max_batch_size + `max_queue_size` requests are open; `num_preparing` threads decode
    images, each holding one picture (up to MAX_IMAGE_PIXELS) at a time.
    """

    def __init__(self, runner: Runner, *, max_queue_size: int = 64, num_preparing: int = 2) -> None:
        self.runner = runner
        self.metrics = ServingMetrics()
        self._max_batch_size = runner.engine.limits.max_batch_size
        self._max_open = self._max_batch_size + max_queue_size
        self._open: set[Ticket] = set()
        self._lock = threading.Lock()
        self._to_prepare: SimpleQueue[Ticket | None] = SimpleQueue()
        self._to_prepare_text: SimpleQueue[Ticket | None] = SimpleQueue()
        self._to_encode: SimpleQueue[tuple[Ticket, PreparedRequest] | None] = SimpleQueue()
        # None wakes the decoder's thread: something was cancelled, or the server closes.
        self._to_decode: SimpleQueue[tuple[Ticket, EncodedRequest] | None] = SimpleQueue()
        self._is_closing = False
        self._failure: Exception | None = None  # of the decoder's thread, which it ended
        self._num_running = 0
        self._is_prepared = threading.Event()
        self._threads = [
            *(
                threading.Thread(target=self._prepare_loop, args=(self._to_prepare,))
                for _ in range(num_preparing)
            ),
            threading.Thread(target=self._prepare_loop, args=(self._to_prepare_text,)),
            threading.Thread(target=self._encode_loop),
            threading.Thread(target=self._run_decoder),
        ]
        for thread in self._threads:
            thread.start()
        self._is_prepared.wait()
        try:
            self._require_decoder()
        except RuntimeError:
            self.close()
            raise

    @property
    def num_open(self) -> int:
        return len(self._open)

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Accepts a request, whose answers go to `listener`. Raises `BusyError` when full or
        stopping, and `RuntimeError` once the decoder has failed."""
        ticket = Ticket(request, listener)
        error: BusyError | None = None
        with self._lock:
            self._require_decoder()
            if self._is_closing:
                error = _stopping()
            elif len(self._open) >= self._max_open:
                busy = f"the server is busy with {self._max_open} requests; try again later"
                error = BusyError(busy)
            else:
                self._open.add(ticket)
        if error is not None:
            self.metrics.add("nvlm_requests_total", label="busy")
            raise error
        is_text = all(isinstance(part, str) for part in request.content)
        (self._to_prepare_text if is_text else self._to_prepare).put(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Frees the request's place before the next step. Its listener hears nothing more but what
        is being said right now."""
        ticket.is_cancelled = True
        self._to_decode.put(None)

    def samples(self) -> dict[tuple[str, Labels], float]:
        """Every metric as it is now."""
        num_running = self._num_running
        self.metrics.set("nvlm_requests_running", num_running)
        self.metrics.set("nvlm_requests_waiting", max(0, self.num_open - num_running))
        return self.metrics.samples()

    def close(self) -> None:
        """Refuses what is open and waits for the threads; the runner stays open."""
        self._refuse_all(_stopping())
        for _ in self._threads:
            self._to_prepare.put(None)
        self._to_prepare_text.put(None)
        self._to_encode.put(None)
        self._to_decode.put(None)
        for thread in self._threads:
            thread.join()

    def _require_decoder(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the decoder has failed; start again") from self._failure

    def _refuse_all(self, error: Exception) -> None:
        """Of now and from now on."""
        with self._lock:
            self._is_closing = True
            tickets = list(self._open)
        for ticket in tickets:
            self._fail(ticket, error)
            ticket.is_cancelled = True

    def _end(self, ticket: Ticket, outcome: Outcome) -> bool:
        """Whether the ticket was open; from here on it is not."""
        with self._lock:
            was_open = ticket in self._open
            self._open.discard(ticket)
        if was_open:
            self.metrics.add("nvlm_requests_total", label=outcome)
        return was_open

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if self._end(ticket, "refused" if isinstance(error, UserError) else "failed"):
            self._tell(ticket, Answer(error=error))

    def _tell(self, ticket: Ticket, answer: Answer) -> None:
        """A listener's exception ends its own request only."""
        if ticket.is_cancelled:
            return
        try:
            ticket.listener(answer)
        except Exception:
            logger.exception("the listener of a request failed")
            self.cancel(ticket)

    def _is_dropped(self, ticket: Ticket) -> bool:
        """Whether the ticket was cancelled; then its place is free."""
        if ticket.is_cancelled:
            self._end(ticket, "cancelled")
        return ticket.is_cancelled

    def _prepare_loop(self, queue: SimpleQueue[Ticket | None]) -> None:
        while (ticket := queue.get()) is not None:
            if self._is_dropped(ticket):
                continue
            try:
                prepared = self.runner.prepare(ticket.request, ticket.accepted)
                if prepared.images:
                    self._to_encode.put((ticket, prepared))
                else:
                    self._to_decode.put((ticket, self.runner.encode(prepared)))
            except Exception as error:
                self._fail(ticket, error)

    def _encode_loop(self) -> None:
        while (item := self._to_encode.get()) is not None:
            ticket, prepared = item
            if self._is_dropped(ticket):
                continue
            try:
                encoded = self.runner.encode(prepared)
            except Exception as error:
                self._fail(ticket, error)
                continue
            self.metrics.add("nvlm_tiles_total", encoded.num_tiles)
            self._to_decode.put((ticket, encoded))

    def _run_decoder(self) -> None:
        """Nobody waits for a decoder that has ended."""
        try:
            warm_up(self.runner.decoder)
            self._is_prepared.set()
            self._decode_loop()
        except Exception as error:
            logger.exception("the decoder's thread ended")
            with self._lock:
                self._failure = error
            self._refuse_all(error)
        finally:
            self._is_prepared.set()

    def _decode_loop(self) -> None:
        waiting: deque[tuple[Ticket, EncodedRequest]] = deque()
        running: dict[int, Ticket] = {}
        while not self._is_closing:
            self._num_running = len(running)
            self._take_in(waiting, wait=not running and not waiting)
            for request_id, ticket in list(running.items()):
                if self._is_dropped(ticket):
                    self.runner.cancel(request_id)
                    del running[request_id]
            waiting = deque(item for item in waiting if not self._is_dropped(item[0]))
            while waiting and len(running) < self._max_batch_size:
                self._start(*waiting.popleft(), running)
            self._num_running = len(running)
            if running:
                self._step(running)
        for request_id in running:
            self.runner.cancel(request_id)

    def _take_in(self, waiting: deque[tuple[Ticket, EncodedRequest]], wait: bool) -> None:
        while wait or not self._to_decode.empty():
            item = self._to_decode.get()
            wait = False
            if item is not None:
                waiting.append(item)

    def _start(self, ticket: Ticket, encoded: EncodedRequest, running: dict[int, Ticket]) -> None:
        try:
            running[self.runner.start(encoded)] = ticket
        except Exception as error:
            self._fail(ticket, error)
            return
        self.metrics.add("nvlm_prompt_tokens_total", len(encoded.decoder_request.token_ids))

    def _step(self, running: dict[int, Ticket]) -> None:
        """One step for everything that runs; what breaks in a step is told to all in it."""
        try:
            deltas = self.runner.step()
        except Exception as error:
            for request_id, ticket in running.items():
                self.runner.cancel(request_id)
                self._fail(ticket, error)
            running.clear()
            return
        if deltas:
            self.metrics.observe("nvlm_decode_batch_size", len(deltas))
        for delta in deltas:
            ticket = running[delta.request_id]
            self._count_token(ticket)
            if delta.error is not None:
                self._fail(ticket, delta.error)
            elif delta.result is not None:
                self._finish(ticket, delta.text, delta.result)
            elif delta.text:
                self._tell(ticket, Answer(delta.text))
            if delta.result is not None or delta.error is not None:
                del running[delta.request_id]

    def _count_token(self, ticket: Ticket) -> None:
        now = time.perf_counter()
        if ticket.last_token is None:
            self.metrics.observe("nvlm_time_to_first_token_seconds", now - ticket.accepted)
        else:
            self.metrics.observe("nvlm_time_per_output_token_seconds", now - ticket.last_token)
        ticket.last_token = now

    def _finish(self, ticket: Ticket, text: str, result: GenerationResult) -> None:
        if self._end(ticket, result.finish_reason):
            self.metrics.add("nvlm_generated_tokens_total", result.num_tokens)
            self.metrics.observe("nvlm_queue_seconds", result.timings.queue_ms / 1e3)
            self._tell(ticket, Answer(text, result))


def _stopping() -> BusyError:
    return BusyError("the server is stopping; ask another")
