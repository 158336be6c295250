"""The loop on a thread of its own, for clients that come at any time.

A picture that is decoded or encoded stops nobody's tokens, and what is accepted and not yet
answered is bounded. A thread that dies or hangs ends the server: its requests are answered with
the reason, and `on_end` is called with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from nvlm.program.errors import UserError
from runtime.requests.types import GenerationRequest
from runtime.serving.loop import Loop
from runtime.serving.metrics import Labels, ServingMetrics
from runtime.serving.part import Part
from runtime.serving.picture_types import require_server_types
from runtime.serving.runner import Runner
from runtime.serving.ticket import Listener, Ticket
from runtime.serving.watch import LOOK_S, Watch, died

logger = logging.getLogger(__name__)

_LOOKS_PER_CHECK = 5  # of the engine's files, while no request is open
_LOOKS_PER_PROBE = 30
_PROBES_AFTER_FAILURE = 3
_REST_PER_PROBE = 100.0  # a probe takes a hundredth of the time, at most


def _nobody(_: Exception) -> None:
    """The default `on_end`: whoever asks `failure` needs no call."""


class Server:
    """`submit` and `cancel` may be called by any thread.

    The constructor raises `UserError` while another loop uses the runner.

    At most max_batch_size + `max_queue_size` requests are open. `num_preparing` threads decode
    pictures, and share the memory of one `PictureBudget`.

    on_end: is called once, from another thread, with the reason why the server ends, after all open
    requests were answered with it: a `UserError`, as for an engine that was changed, else a
    `PartDiedError`.
    hang_after_s: seconds without progress after which a thread counts as hung; None is the limit
    that the plan sets for its work.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_queue_size: int = 64,
        num_preparing: int = 2,
        on_end: Callable[[Exception], None] = _nobody,
        hang_after_s: float | None = None,
        look_s: float = LOOK_S,
    ) -> None:
        self.runner = runner
        self.failure: Exception | None = None
        """Why it answers no more: a door's health is bad from here on."""
        self._on_end, self._look_s = on_end, look_s
        self._num_idle_looks = 0
        self._next_probe = _LOOKS_PER_PROBE
        max_open = runner.engine.limits.max_batch_size + max_queue_size
        self._loop = Loop(runner, max_open=max_open, num_preparing=num_preparing)
        self._parts = self._loop.parts
        self._watch = Watch(
            self._parts, self._end, self._look_after, hang_after_s=hang_after_s, look_s=look_s
        )
        self._thread = threading.Thread(target=self._run, name="nvlm-decoder", daemon=True)
        self._thread.start()
        self._loop.part.thread = self._thread
        self._watch.start()

    @property
    def metrics(self) -> ServingMetrics:
        return self._loop.metrics

    @property
    def num_open(self) -> int:
        return self._loop.num_open

    @property
    def is_full(self) -> bool:
        """Whether the next `submit` is refused."""
        return self._loop.is_full

    @property
    def has_failed(self) -> bool:
        """Whether no request will be answered any more: a part of the server died or hangs, or
        another rank died."""
        is_lost = self._loop.has_failed or self.runner.has_lost_rank()
        return is_lost or self.failure is not None

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Accepts a request, whose answer goes to `listener`. Raises `BusyError` when full or
        stopping, `RuntimeError` once the decoder has failed, and `UserError` for what is no
        request, or a picture of a type that no server reads."""
        if not isinstance(request, GenerationRequest):
            raise UserError(
                f"the request is of type {type(request).__name__}, expected a GenerationRequest; "
                "make one with GenerationRequest.images_first"
            )
        require_server_types(request)
        return self._loop.submit(request, listener)

    def cancel(self, ticket: Ticket) -> None:
        """Frees the request's place before the next step. Its listener is not called
        again, but a call in progress finishes."""
        self._loop.cancel(ticket)

    def samples(self) -> dict[tuple[str, Labels], float]:
        """Every metric as it is now."""
        return self._loop.samples()

    def begin_anew(self) -> None:
        """Counts from zero, before the first client asks (rehearsal.py)."""
        self._loop.begin_anew()

    def watch(self, part: Part) -> None:
        """Watches a thread of a door's own with the server's."""
        self._parts.append(part)

    def close(self) -> None:
        """Refuses what is open and waits for the threads, unless one hangs; the runner stays
        open."""
        self._watch.close()
        self._loop.stop()
        if self.failure is None or not any(part.is_stuck for part in self._loop.parts):
            self._thread.join()
            self._loop.close()

    def _run(self) -> None:
        """Nobody waits for a decoder that has ended. One that broke in a step is asked for another:
        a GPU that is gone fails every step from then on."""
        try:
            while not self._loop.is_stopping:
                self._loop.turn()
                if self._loop.has_failed_step:
                    self._loop.has_failed_step = False
                    self._require_decoder()
        except BaseException as error:
            logger.exception("the decoder's thread ended")
            self._loop.part.error = error
            self._loop.stop(died(self._loop.part))

    def _require_decoder(self) -> None:
        """Raises what the last of several probes raised: what broke a step may be over soon."""
        for number in range(_PROBES_AFTER_FAILURE):
            try:
                self.runner.probe()
                return
            except Exception:
                if number + 1 == _PROBES_AFTER_FAILURE:
                    raise
                time.sleep(self._look_s)

    def _end(self, error: Exception) -> None:
        self.failure = error
        self.runner.has_failed = True
        self._loop.stop(error)
        self._on_end(error)

    def _look_after(self) -> None:
        """Now and then, while no request is open: are the engine's files as they were, and does
        the decoder take a step?"""
        if self._loop.num_open:
            self._num_idle_looks, self._next_probe = 0, _LOOKS_PER_PROBE
            return
        self._num_idle_looks += 1
        if self._num_idle_looks >= self._next_probe:
            self._next_probe = self._num_idle_looks + _LOOKS_PER_PROBE
            self._loop.when_idle(self._probe)
        elif self._num_idle_looks % _LOOKS_PER_CHECK == 0:
            self._loop.when_idle(self.runner.mapped.require_unchanged)

    def _probe(self) -> None:
        self.runner.mapped.require_unchanged()
        begun = time.monotonic()
        self.runner.probe()
        rest = _REST_PER_PROBE * (time.monotonic() - begun)
        self._next_probe = self._num_idle_looks + max(_LOOKS_PER_PROBE, int(rest / self._look_s))
