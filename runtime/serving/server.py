"""The loop on a thread of its own, for clients that come at any time.

A picture that is decoded or encoded stops nobody's tokens, and what is accepted and not yet
answered is bounded.
"""

from __future__ import annotations

import logging
import threading

from runtime.decoder.executor import warm_up
from runtime.requests.types import GenerationRequest
from runtime.serving.loop import Loop
from runtime.serving.metrics import Labels, ServingMetrics
from runtime.serving.runner import Runner
from runtime.serving.ticket import Listener, Ticket

logger = logging.getLogger(__name__)


class Server:
    """`submit` and `cancel` may be called by any thread.

    A decoder that cannot begin is a `RuntimeError` of the constructor, with its cause.

    At most max_batch_size + `max_queue_size` requests are open; `num_preparing` threads decode
    images, each holding one picture (up to MAX_IMAGE_PIXELS) at a time.
    """

    def __init__(self, runner: Runner, *, max_queue_size: int = 64, num_preparing: int = 2) -> None:
        self.runner = runner
        max_open = runner.engine.limits.max_batch_size + max_queue_size
        self._loop = Loop(runner, max_open=max_open, num_preparing=num_preparing)
        self._is_prepared = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._is_prepared.wait()
        try:
            self._loop.require_decoder()
        except RuntimeError:
            self.close()
            raise

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
        """Whether the decoder's thread has ended by an error, or a rank died: no request will be
        answered."""
        return self._loop.has_failed or self.runner.has_lost_rank()

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        """Accepts a request, whose answer goes to `listener`. Raises `BusyError` when full or
        stopping, and `RuntimeError` once the decoder has failed."""
        return self._loop.submit(request, listener)

    def cancel(self, ticket: Ticket) -> None:
        """Frees the request's place before the next step. Its listener hears nothing more but what
        is being said right now."""
        self._loop.cancel(ticket)

    def samples(self) -> dict[tuple[str, Labels], float]:
        """Every metric as it is now."""
        return self._loop.samples()

    def close(self) -> None:
        """Refuses what is open and waits for the threads; the runner stays open."""
        self._loop.stop()
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        """Nobody waits for a decoder that has ended."""
        try:
            warm_up(self.runner.decoder)
            self._is_prepared.set()
            while not self._loop.is_stopping:
                self._loop.turn()
        except Exception as error:
            logger.exception("the decoder's thread ended")
            self._loop.stop(error)
        finally:
            self._is_prepared.set()
