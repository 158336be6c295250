"""Eight text requests decode while pictures of seven tiles arrive, through runtime/serving.

Pictures are JPEG files: decoding, tiling, encoding and the prompt are all on their path. Every time
is a client's: from the submission to the piece of text that the server hands out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

from bench.hopper.decoder import PAUSE_S
from bench.rows import (
    FirstPictures,
    Interactive,
    first_token_summary,
    gap_percentiles,
)
from bench.synthetic_runner import NUM_TILES, draw_pictures, picture_request, text_request
from nvlm.model.config import VisionConfig
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.rehearsal import rehearse
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket

NUM_TEXTS = 8
MAX_BATCH_SIZE = 2 * NUM_TEXTS  # room for pictures beside the texts
NUM_ALONE = 10  # pictures one by one, right after the server is ready
PICTURE_ANSWER = 8
_TEXT_TOKENS = 156  # of a picture's prompt, with its tags
_START_S = 300.0  # until the texts decode; a server that takes longer hangs


def picture_tokens(config: VisionConfig) -> int:
    """Tokens of a picture's prompt."""
    return NUM_TILES * config.tokens_per_tile + _TEXT_TOKENS


def measure_interactive(
    runner: Runner,
    folder: Path,
    rates: list[float],
    seconds: float,
    context: int,
    max_step_ms: float,
    *,
    is_fresh: bool,
) -> Iterator[FirstPictures | Interactive]:
    """Starts a server, which rehearses as `serve.py` does before it is ready, sends it pictures
    alone, then measures each rate for `seconds`.

    max_step_ms: the decoder's. is_fresh: the runner has answered nobody. If not, no pictures come
    alone: what an earlier request has warmed, the first of them would not show.
    """
    vision = runner.engine.vision_config
    counts = [int(rate * seconds) for rate in rates]
    num_alone = NUM_ALONE if is_fresh else 0
    num_tokens, number = picture_tokens(vision), num_alone + sum(counts)
    paths = draw_pictures(folder, number, vision.image_size, runner.num_pictures)
    pictures = [
        picture_request(runner, path, num_tokens, PICTURE_ANSWER, seed)
        for seed, path in enumerate(paths)
    ]
    answer = context // 2
    texts = [text_request(runner, context - answer // 2, answer, seed) for seed in range(NUM_TEXTS)]
    num_layers = runner.engine.checkpoint_config.decoder.num_hidden_layers
    server = Server(runner, max_queue_size=number)
    try:
        if is_fresh:
            rehearse(server)
        if alone := [_first_token_ms(server, picture) for picture in pictures[:num_alone]]:
            yield FirstPictures(
                "first pictures", num_layers, 1, num_tokens, alone, alone[0] / alone[-1]
            )
        rest = iter(pictures[num_alone:])
        for rate, count in zip(rates, counts, strict=True):
            arriving = [next(rest) for _ in range(count)]
            gaps, waits, num_restarts = _measure_rate(server, texts, arriving, rate, seconds)
            yield Interactive(
                "interactive",
                num_layers,
                NUM_TEXTS,
                context,
                rate,
                seconds,
                len(gaps),
                gap_percentiles(gaps),
                len(waits),
                first_token_summary(waits),
                num_restarts,
                max_step_ms,
            )
    finally:
        server.close()


@dataclass(eq=False, slots=True)
class _Client:
    """Sends a request and notes when each piece of the answer came (time.perf_counter)."""

    server: Server
    request: GenerationRequest
    ended: SimpleQueue[_Client]
    times: list[float] = field(default_factory=list)
    submitted: float = 0.0
    ticket: Ticket | None = None
    error: Exception | None = None

    def send(self) -> _Client:
        self.submitted = time.perf_counter()
        self.ticket = self.server.submit(self.request, self._hear)
        return self

    @property
    def first_token_ms(self) -> float:
        return 1e3 * (self.times[0] - self.submitted)

    def _hear(self, answer: Answer) -> None:
        self.times.append(time.perf_counter())
        self.error = answer.error
        if answer.is_last:
            self.ended.put(self)


def _first_token_ms(server: Server, picture: GenerationRequest) -> float:
    time.sleep(PAUSE_S)
    return _wait(_Client(server, picture, SimpleQueue()).send().ended).first_token_ms


def _measure_rate(
    server: Server,
    texts: list[GenerationRequest],
    pictures: list[GenerationRequest],
    rate: float,
    seconds: float,
) -> tuple[list[float], list[float], int]:
    """Milliseconds: gaps that began within `seconds`, and first tokens; how many texts restarted.

    A text that ends comes again at once. Its prompt is still in the KV cache, so that only pictures
    bring prompts to compute.
    """
    ended: SimpleQueue[_Client] = SimpleQueue()
    decoding = [_Client(server, text, ended).send() for text in texts]
    deadline = time.perf_counter() + _START_S
    while not all(client.times for client in decoding):
        assert time.perf_counter() < deadline, "the texts do not begin"
        time.sleep(0.01)
    heard, sent = list(decoding), list[_Client]()
    start = time.perf_counter()
    num_open = 0
    while num_open or len(sent) < len(pictures) or time.perf_counter() < start + seconds:
        wait_s = 0.02
        if len(sent) < len(pictures):
            wait_s = start + (len(sent) + 0.5) / rate - time.perf_counter()
        if wait_s <= 0:
            sent.append(_Client(server, pictures[len(sent)], ended).send())
            num_open += 1
            continue
        try:
            client = _wait(ended, wait_s)
        except Empty:
            continue
        if client in decoding:
            decoding.remove(client)
            decoding.append(_Client(server, client.request, ended).send())
            heard.append(decoding[-1])
        else:
            num_open -= 1
    for client in decoding:
        assert client.ticket is not None, "it was sent"
        server.cancel(client.ticket)
    while server.num_open:
        time.sleep(0.01)
    gaps = [
        1e3 * (after - before)
        for client in heard
        for before, after in zip(client.times, client.times[1:], strict=False)
        if start <= before < start + seconds
    ]
    return gaps, [client.first_token_ms for client in sent], len(heard) - len(texts)


def _wait(ended: SimpleQueue[_Client], timeout_s: float | None = None) -> _Client:
    """The next client whose answer is complete. Raises `Empty` after the time, and its error."""
    client = ended.get(timeout=timeout_s)
    if client.error is not None:
        raise client.error
    return client
