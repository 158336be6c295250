"""THE loop over the decoder's steps: every question, batch, benchmark and server goes through it.

Requests come from any thread, are prepared and encoded (intake.py), share the decoder's steps, and
hear their answers piece by piece. Whoever calls `turn` is the decoder's thread: the one that asks
or one that works for all who ask (shared_loop.py), or a server's own (server.py).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Literal

from nvlm.program.errors import PartDiedError, UserError
from runtime.decoder.executor import CountsSteps, DecoderCounts, StepOutput
from runtime.requests.types import Answer, GenerationRequest, GenerationResult
from runtime.serving.intake import Intake
from runtime.serving.metrics import WAIT_CAUSES, Labels, ServingMetrics
from runtime.serving.part import Part
from runtime.serving.stages import Stages
from runtime.serving.ticket import Draft, Listener, Ticket

logger = logging.getLogger(__name__)

Outcome = Literal["stop", "length", "refused", "failed", "cancelled", "busy"]


class BusyError(UserError):
    """The loop has as many requests as it takes; the same request may succeed later."""


class StoppingError(BusyError):
    """The loop stops; the same request may succeed at another server."""


class Loop:
    """`submit`, `accept`, `deliver`, `cancel` and `stop` may be called by any thread, `turn` by one
    at a time.

    At most `max_open` requests are open: accepted and not yet answered. `num_preparing`: threads
    that decode pictures beside the decoder; 0 prepares and encodes within `submit`. Raises
    `UserError` while another loop of the same stages is open: each would miss the other's tokens.
    """

    def __init__(self, stages: Stages, *, max_open: int, num_preparing: int = 0) -> None:
        if not stages.in_loop.acquire(blocking=False):
            raise UserError(
                "this runner is answering already: a server of it is open, or a question, stream "
                "or batch is; ask that server, or close what is open first"
            )
        self.metrics = ServingMetrics()
        self._counts_before = DecoderCounts()  # when it began to count
        self.stages = stages
        self._max_open = max_open
        self._lock = threading.Lock()  # of the next four
        self._open: set[Ticket] = set()
        self._for_a_place: deque[tuple[Ticket, threading.Lock]] = deque()  # locked until it has one
        self._is_stopping = False
        self._is_closed = False
        self._failure: Exception | None = None  # of the decoder's thread, which it ended
        # None wakes the decoder's thread: something was cancelled, or the loop stops.
        self._encoded: SimpleQueue[Ticket | None] = SimpleQueue()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Draft] = {}  # by the decoder's id
        self._when_idle: Callable[[], None] | None = None
        self.part = Part("the decoder's thread")  # which thread that is, who takes the turns says
        self.has_failed_step = False  # the last one; all in it got the error
        self._intake = Intake(stages, num_preparing, self.deliver)

    @property
    def parts(self) -> list[Part]:
        """What a server watches."""
        return [self.part, *self._intake.parts]

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def is_full(self) -> bool:
        return self.num_open >= self._max_open

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Accepts a request, whose answer goes to `listener`. Raises `BusyError` when full or
        stopping, and `RuntimeError` once the decoder has failed."""
        ticket = self.accept(request, listener)
        self._intake.put(ticket)
        return ticket

    def accept(
        self, request: GenerationRequest, listener: Listener, *, waits: bool = False
    ) -> Ticket:
        """As `submit`, for a caller that prepares the ticket and gives it to `deliver` itself.
        With `waits` it waits for a place, first come first served, while others take the turns."""
        ticket = Ticket(request, listener)
        error: BusyError | None = None
        place: threading.Lock | None = None
        with self._lock:
            self.require_decoder()
            if self._is_stopping:
                error = _stopping()
            elif not self.is_full:
                self._open.add(ticket)
            elif waits:
                place = threading.Lock()
                place.acquire()
                self._for_a_place.append((ticket, place))
            else:
                busy = f"the server is busy with {self._max_open} requests; try again later"
                error = BusyError(busy)
        if error is not None:
            self.metrics.add("nvlm_requests_total", label="busy")
            raise error
        if place is not None:
            self._wait_for_place(ticket, place)
        return ticket

    def deliver(self, ticket: Ticket) -> None:
        """Takes a ticket back that is encoded, has its `error`, or is cancelled."""
        self._encoded.put(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Frees the request's place before the next step. Its listener is not called
        again, but a call in progress finishes."""
        ticket.is_cancelled = True
        self._encoded.put(None)

    def when_idle(self, work: Callable[[], None]) -> None:
        """Does `work` in a turn that has no step to take, or never. It takes no longer than a
        step."""
        self._when_idle = work
        self._encoded.put(None)

    def turn(self) -> None:
        """One step for all requests that run, which others join before it; waits for a request
        where there is none."""
        self._take_in()
        self._drop_cancelled()
        self._start_waiting()
        work, self._when_idle = self._when_idle, None
        if self._running:
            self.part.begin(self.stages.step_limit.seconds(self._most_tokens()))
            self._step()
        elif work is not None:
            work()

    def stop(self, failure: Exception | None = None) -> None:
        """Refuses every request, of now and from now on: with the decoder's `failure`, if that is
        why."""
        with self._lock:
            self._is_stopping = True
            self._failure = self._failure or failure
            tickets = list(self._open)
            while self._for_a_place:
                waiting, place = self._for_a_place.popleft()
                waiting.error = failure or _stopping()
                place.release()
        for ticket in tickets:
            self._fail(ticket, failure or _stopping())
            ticket.is_cancelled = True
        self._encoded.put(None)

    def close(self) -> None:
        """For the decoder's thread, or once it has ended. The stages stay open."""
        self.stop()
        for request_id in self._running:
            self.stages.decoder.cancel(request_id)
        self._running.clear()
        self._intake.close()
        if not self._is_closed:
            self._is_closed = True
            self.stages.in_loop.release()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_decoder(self) -> None:
        if self._failure is not None:
            raise PartDiedError("the decoder has failed; start again") from self._failure

    def begin_anew(self) -> None:
        """Counts from zero, for who has rehearsed; no request is open."""
        self.metrics = ServingMetrics()
        self.stages.forget_pictures()
        if isinstance(self.stages.decoder, CountsSteps):
            self._counts_before = self.stages.decoder.counts()

    def samples(self) -> dict[tuple[str, Labels], float]:
        """Every metric as it is now."""
        num_running = len({draft.ticket for draft in self._running.values()})
        num_waiting = max(0, self.num_open - num_running)
        waiting: dict[str, int] = dict.fromkeys(WAIT_CAUSES, 0)
        waiting["place"] = len(self._waiting)
        waiting["preparation"] = max(0, num_waiting - waiting["place"])
        self.metrics.set("nvlm_requests_running", num_running)
        self.metrics.set("nvlm_requests_waiting", num_waiting)
        self.metrics.set("nvlm_vision_seconds_total", self.stages.vision_s)
        self.metrics.set("nvlm_mm_cache_queries_total", self.stages.num_pictures)
        self.metrics.set("nvlm_mm_cache_hits_total", self.stages.num_known_pictures)
        if isinstance(self.stages.decoder, CountsSteps):
            counts = self.stages.decoder.counts().since(self._counts_before)
            self.metrics.set("nvlm_kv_cache_usage_perc", counts.usage)
            self.metrics.set("nvlm_num_preemptions_total", counts.num_preemptions)
            self.metrics.set("nvlm_prefix_cache_queries_total", counts.num_queried_tokens)
            self.metrics.set("nvlm_prefix_cache_hits_total", counts.num_reused_tokens)
            name = "nvlm_computed_prompt_tokens_total"
            self.metrics.set(name, counts.num_tokens_beside, label="yes")
            self.metrics.set(name, counts.num_tokens_alone, label="no")
            for decoder_cause, number in counts.waiting.items():
                waiting[decoder_cause] += number
        for cause, number in waiting.items():
            self.metrics.set("nvlm_requests_waiting_by_cause", number, label=cause)
        return self.metrics.samples()

    def _wait_for_place(self, ticket: Ticket, place: threading.Lock) -> None:
        """Raises why the loop stops, if it does so meanwhile."""
        try:
            place.acquire()
        except BaseException:  # an interrupted wait
            with self._lock, suppress(ValueError):
                self._for_a_place.remove((ticket, place))
            self._end(ticket, "cancelled")
            raise
        if ticket.error is not None:
            raise ticket.error

    def _take_in(self) -> None:
        is_idle = not self._running and not self._waiting
        while is_idle or not self._encoded.empty():
            if is_idle:
                self.part.rest()
            ticket = self._encoded.get()
            self.part.begin(self.stages.step_limit.seconds(1))
            is_idle = False
            if ticket is None:
                continue
            if ticket.error is not None:
                self._fail(ticket, ticket.error)
            else:
                self._waiting.append(ticket)

    def _drop_cancelled(self) -> None:
        for request_id, draft in list(self._running.items()):
            if self._is_dropped(draft.ticket):
                self._leave(request_id)
        self._waiting = deque(t for t in self._waiting if not self._is_dropped(t))

    def _is_dropped(self, ticket: Ticket) -> bool:
        """Whether the ticket was cancelled; then its place is free."""
        is_cancelled = ticket.is_cancelled  # read once: any thread may cancel meanwhile
        if is_cancelled:
            self._end(ticket, "cancelled")
        return is_cancelled

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self.stages.engine.limits.max_batch_size:
            ticket = min(self._waiting, key=lambda each: each.request.priority)  # the first such
            self._waiting.remove(ticket)
            try:
                self._running |= self.stages.start(ticket)
            except Exception as error:
                self._fail(ticket, error)
                continue
            self.metrics.add("nvlm_prompt_tokens_total", len(ticket.prompt_ids))
            self.metrics.add("nvlm_tiles_total", ticket.num_tiles)

    def _most_tokens(self) -> int:
        """The most tokens of a step: all of every draft that runs, since one that gave up its
        blocks is computed again."""
        return sum(
            len(draft.ticket.prompt_ids) + len(draft.token_ids) for draft in self._running.values()
        )

    def _step(self) -> None:
        """An error in a step goes to all requests in it."""
        begun = time.perf_counter()
        try:
            outputs = self.stages.decoder.step()
            self.has_failed_step = False
        except Exception as error:
            self.has_failed_step = True
            for request_id, draft in list(self._running.items()):
                self._leave(request_id)
                self._fail(draft.ticket, error)
            return
        if outputs:
            self.metrics.observe("nvlm_step_seconds", time.perf_counter() - begun)
            self.metrics.observe("nvlm_decode_batch_size", len(outputs))
        for output in outputs:
            if output.request_id in self._running:  # a stop string may have ended it in this step
                self._take(self._running[output.request_id], output)

    def _take(self, draft: Draft, output: StepOutput) -> None:
        before, ticket = draft.last_token, draft.ticket
        try:
            answer = draft.take(output)
        except Exception as error:
            answer = Answer(error=error)
        if answer.finish_reason is not None:
            self.stages.mapped.require_unchanged()  # else it ends every answer
        self._count_token(draft, before)
        if answer.finish_reason is not None:
            self._leave(output.request_id)  # a stop string ends it unknown to the decoder
        if answer.error is not None:
            for request_id, other in list(self._running.items()):
                if other.ticket is ticket:
                    self._leave(request_id)
            self._fail(ticket, answer.error)
        elif answer.result is not None:
            self._finish(ticket, answer, answer.result)
        elif answer.text or answer.logprobs or answer.finish_reason is not None:
            self._notify(ticket, answer)

    def _leave(self, request_id: int) -> None:
        self.stages.decoder.cancel(request_id)
        del self._running[request_id]

    def _count_token(self, draft: Draft, before: float | None) -> None:
        if draft.last_token is None:
            return
        if before is None:
            taken = draft.last_token - draft.ticket.accepted
            self.metrics.observe("nvlm_time_to_first_token_seconds", taken)
        else:
            taken = draft.last_token - before
            self.metrics.observe("nvlm_time_per_output_token_seconds", taken)

    def _finish(self, ticket: Ticket, answer: Answer, result: GenerationResult) -> None:
        if self._end(ticket, result.finish_reason):
            self.metrics.add("nvlm_generated_tokens_total", result.num_tokens)
            self._observe_times(result)
            self._notify(ticket, answer)

    def _observe_times(self, result: GenerationResult) -> None:
        timings, num_further = result.timings, result.num_tokens - 1
        times = {
            "nvlm_queue_seconds": timings.queue_ms,
            "nvlm_e2e_request_latency_seconds": timings.total_ms,
            "nvlm_request_prefill_time_seconds": timings.prefill_ms,
            "nvlm_request_decode_time_seconds": timings.decode_ms,
            "nvlm_request_inference_time_seconds": timings.prefill_ms + timings.decode_ms,
        }
        if num_further > 0:
            times["nvlm_request_time_per_output_token_seconds"] = timings.decode_ms / num_further
        for name, milliseconds in times.items():
            self.metrics.observe(name, milliseconds / 1e3)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if self._end(ticket, "refused" if isinstance(error, UserError) else "failed"):
            self._notify(ticket, Answer(error=error))

    def _end(self, ticket: Ticket, outcome: Outcome) -> bool:
        """Whether the ticket was open; from here on it is not."""
        with self._lock:
            was_open = ticket in self._open
            self._open.discard(ticket)
            while self._for_a_place and not self.is_full:
                next_ticket, place = self._for_a_place.popleft()
                self._open.add(next_ticket)
                place.release()
        if was_open:
            self.metrics.add("nvlm_requests_total", label=outcome)
        return was_open

    def _notify(self, ticket: Ticket, answer: Answer) -> None:
        """A listener's exception ends its own request only."""
        if ticket.is_cancelled:
            return
        try:
            ticket.listener(answer)
        except Exception:
            logger.exception("the listener of a request failed")
            self.cancel(ticket)


def _stopping() -> StoppingError:
    return StoppingError("the server is stopping; ask another")
