"""An opened engine that answers: one question, or many that share the decoder's steps.

Any number of threads may ask at once, through one loop (shared_loop.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvlm.program import startup
from nvlm.program.command_line import resolve_device
from nvlm.program.errors import UserError, shown
from runtime.decoder.executor import DecoderExecutor, DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.engine.libraries import set_up_libraries
from runtime.engine.mapped_files import EngineChangedError, MappedFiles
from runtime.engine.open_engine import open_engine
from runtime.requests.messages import GivenImage
from runtime.requests.types import Answer, GenerationRequest, GenerationResult
from runtime.serving.engine_parts import for_answers, open_parts
from runtime.serving.shared_loop import SharedLoop
from runtime.serving.stages import Stages
from runtime.vision.executor import VisionExecutor

MAX_PREPARING_THREADS = 8
NUM_AHEAD = 8
"""Requests of a batch that wait with their images encoded, at most: 29 MB each at the 72B model's
size."""


_CPU = torch.device("cpu")


class Runner(Stages):
    """What `Stages` are made of, opened together; a context that closes it.

    Any thread may call `generate`, `stream` and `generate_batch`, at any time: all share the
    decoder's steps. A server of this runner has the decoder for itself.
    """

    def __init__(
        self,
        engine: EngineDir,
        vision: VisionExecutor,
        decoder: DecoderExecutor,
        device: torch.device = _CPU,
        mapped: MappedFiles | None = None,
        *,
        has_lost_rank: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(engine, vision, decoder, device, mapped)
        self.has_lost_rank = has_lost_rank  # of several: one died, so no step will end
        self.has_failed = False  # a part of its server: what may hang is left alone from then on
        self._loop = SharedLoop()
        self._is_closed = False

    @classmethod
    def open(
        cls,
        engine_dir: Path | str,
        device: torch.device | str = "auto",
        options: DecoderOptions | None = None,
        environment: MutableMapping[str, str] | None = None,
    ) -> Runner:
        """Loads an engine directory onto a device, on one rank; launch.py does on several.

        device: auto is a GPU where there is one. environment: os.environ of a program, in which it
        sets what cuBLAS reads before its first product on a GPU; None leaves it as it is.
        """
        device = _device(device)
        with startup.phase("the engine's files"):
            engine = open_engine(Path(engine_dir), device)
            engine = for_answers(engine, device, None if options is None else options.num_answers)
        if environment is not None:
            set_up_libraries(engine, device, environment)
        mapped = MappedFiles.of(engine, device)
        return cls(engine, *open_parts(engine, device, options), device, mapped)

    def generate(
        self,
        request: GenerationRequest | str | None = None,
        images: GivenImage | Iterable[GivenImage] = (),
        *,
        messages: Sequence[Any] | None = None,
        **settings: Any,
    ) -> GenerationResult:
        """Answers one request; or a question with images and settings, as
        `GenerationRequest.images_first` takes them; or a conversation, as `from_messages` does.
        Raises what ends it."""
        asked = GenerationRequest.of(request, images, messages, **settings)
        (last,) = self._ask(asked, in_pieces=False)
        assert last.result is not None, "the last piece has the result"
        return last.result

    def stream(
        self,
        request: GenerationRequest | str | None = None,
        images: GivenImage | Iterable[GivenImage] = (),
        *,
        messages: Sequence[Any] | None = None,
        **settings: Any,
    ) -> Generator[Answer, None, None]:
        """As `generate`, piece by piece; the last piece has the result. Closing it cancels the
        rest."""
        asked = GenerationRequest.of(request, images, messages, **settings)
        return self._ask(asked, in_pieces=True)

    def _ask(self, request: GenerationRequest, *, in_pieces: bool) -> Generator[Answer, None, None]:
        with self._loop.ask(self, max_open=self._max_open(_num_preparing())) as asker:
            asker.submit(request, in_pieces=in_pieces)
            while asker.num_open:
                for _, piece in asker.hear():
                    if piece.error is not None:
                        raise piece.error
                    yield piece

    def generate_batch(
        self, requests: Sequence[GenerationRequest | str], *, in_order: bool = False
    ) -> Iterator[tuple[int, GenerationResult | UserError]]:
        """Answers requests as they finish: (index, result or what was wrong with the request).

        Pictures are decoded and encoded beside the decoder, a bounded number of requests ahead.
        `in_order` encodes between the decoder's steps instead, so that it gets the requests in
        their order.
        """
        if isinstance(requests, (str, GenerationRequest)):
            raise UserError("a batch is a list of questions, found one; give [question]")
        asked = [GenerationRequest.of(request) for request in requests]
        num_preparing = _num_preparing()
        max_open = most = self._max_open(num_preparing)
        if in_order or len(asked) == 1 or not any(request.num_images for request in asked):
            num_preparing, most = 0, self.engine.limits.max_batch_size
        with self._loop.ask(self, max_open=max_open, num_preparing=num_preparing) as asker:
            for index, request in enumerate(asked):
                while asker.num_open >= most:
                    yield from map(_outcome, asker.hear())
                asker.submit(request, index, in_pieces=False)
            while asker.num_open:
                yield from map(_outcome, asker.hear())

    def _max_open(self, num_preparing: int) -> int:
        """Requests that are open at once: in the batch, with their images encoded, in
        preparation."""
        max_batch_size = self.engine.limits.max_batch_size
        return max_batch_size + min(NUM_AHEAD, max_batch_size) + num_preparing

    def close(self) -> None:
        """Ends what is open with a `UserError` and frees the executors; other ranks end with the
        leader's. Does nothing again, nor after a server's failure: the process is to end."""
        if self._is_closed or self.has_failed:
            return
        self._is_closed = True
        self._loop.close()
        self.vision.close()
        self.decoder.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _device(device: torch.device | str) -> torch.device:
    if device in ("auto", "cuda"):
        return resolve_device(str(device))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"device is {shown(device)}, expected 'auto', 'cpu' or 'cuda'")
    if found.type == "cuda":
        resolve_device("cuda")
    return found


def _num_preparing() -> int:
    return min(MAX_PREPARING_THREADS, len(os.sched_getaffinity(0)))


def _outcome(item: tuple[int, Answer]) -> tuple[int, GenerationResult | UserError]:
    """Raises what is not the request's mistake."""
    index, answer = item
    if isinstance(answer.error, UserError) and not isinstance(answer.error, EngineChangedError):
        return index, answer.error
    if answer.error is not None:
        raise answer.error
    assert answer.result is not None, "the last piece has a result or an error"
    return index, answer.result
