"""An opened engine that answers: one question, or many that share the decoder's steps.

The thread that asks takes the steps: no token is handed from thread to thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderOptions
from runtime.engine.libraries import set_up_libraries
from runtime.engine.open_engine import open_engine
from runtime.requests.types import Answer, GenerationRequest, GenerationResult
from runtime.serving.engine_parts import open_parts
from runtime.serving.loop import Loop
from runtime.serving.stages import Stages

T = TypeVar("T")

MAX_PREPARING_THREADS = 8
NUM_AHEAD = 8
"""Requests of a batch that wait with their images encoded, at most: 29 MB each at the 72B model's
size."""


class Runner(Stages):
    """What `Stages` are made of, opened together; a context that closes it.

    It answers one question, stream or batch at a time, and raises `UserError` for another one
    meanwhile. Questions from several threads go through `Server`.
    """

    @classmethod
    def open(
        cls,
        engine_dir: Path,
        device: torch.device,
        options: DecoderOptions | None = None,
        environment: MutableMapping[str, str] | None = None,
    ) -> Runner:
        """Loads an engine directory onto a device, on one rank; launch.py does on several.

        environment: os.environ of a program, in which it sets what cuBLAS reads before its first
        product on a GPU; None leaves it as it is.
        """
        engine = open_engine(engine_dir, device)
        if environment is not None:
            set_up_libraries(engine, device, environment)
        return cls(engine, *open_parts(engine, device, options))

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Answers one request; raises what ends it."""
        *_, last = self.stream(request)
        assert last.result is not None, "the last piece has the result"
        return last.result

    def stream(self, request: GenerationRequest) -> Iterator[Answer]:
        """Answers one request piece by piece; raises what ends it."""
        pieces: deque[Answer] = deque()
        with Loop(self, max_open=1) as loop:
            loop.submit(request, pieces.append)
            while loop.num_open:
                loop.turn()
                for piece in _drained(pieces):
                    if piece.error is not None:
                        raise piece.error
                    yield piece

    def generate_batch(
        self, requests: Sequence[GenerationRequest], *, in_order: bool = False
    ) -> Iterator[tuple[int, GenerationResult | UserError]]:
        """Answers requests as they finish: (index, result or what was wrong with the request).

        Pictures are decoded and encoded beside the decoder, a bounded number of requests ahead.
        `in_order` encodes between the decoder's steps instead, so that it gets the requests in
        their order.
        """
        is_beside = not in_order and len(requests) > 1 and any(r.num_images for r in requests)
        max_open, num_preparing = self.engine.limits.max_batch_size, 0
        if is_beside:
            num_preparing = min(MAX_PREPARING_THREADS, len(os.sched_getaffinity(0)))
            max_open += min(NUM_AHEAD, max_open) + num_preparing
        ended: deque[tuple[int, Answer]] = deque()

        def listen(index: int, answer: Answer) -> None:
            if answer.is_last:
                ended.append((index, answer))

        with Loop(self, max_open=max_open, num_preparing=num_preparing) as loop:
            for index, request in enumerate(requests):
                while loop.is_full:
                    loop.turn()
                    yield from map(_outcome, _drained(ended))
                loop.submit(request, partial(listen, index))
            while loop.num_open:
                loop.turn()
                yield from map(_outcome, _drained(ended))

    def close(self) -> None:
        """Frees the executors; other ranks end with the leader's."""
        self.vision.close()
        self.decoder.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drained(pieces: deque[T]) -> Iterator[T]:
    while pieces:
        yield pieces.popleft()


def _outcome(item: tuple[int, Answer]) -> tuple[int, GenerationResult | UserError]:
    """Raises what is not the request's mistake."""
    index, answer = item
    if isinstance(answer.error, UserError):
        return index, answer.error
    if answer.error is not None:
        raise answer.error
    assert answer.result is not None, "the last piece has a result or an error"
    return index, answer.result
