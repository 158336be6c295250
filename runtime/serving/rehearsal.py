"""What a server asks itself before it is ready, so that no client pays for being the first.

Threads, pictures of every number of tiles, prompts beside a request that decodes, a prompt whose
beginning is in the cache, and every kind of setting come once, by the way that clients' requests
go. Then the server counts from zero.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from PIL import Image

from nvlm.program import startup
from nvlm.program.errors import UserError
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket

logger = logging.getLogger(__name__)

LIMIT_S = 10.0
_SLOW_S = 1.0
_SYSTEM = "This is a rehearsal."
"""It begins every prompt, so that no client's shares a block of the KV cache with one."""

_NUM_BESIDE = 32  # tokens of the answer that pictures come beside
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 0},
    {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logit_bias": ((0, -1.0),),
        "bad_words": ("rehearsal",),
        "min_tokens": 2,
    },
    {"logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 1.0, "seed": 0, "n": 2},
    {"json_object": True},
    {"regex": "[a-z]+"},
)
"""The settings of one request each: a decoder that refuses one setting refuses only that."""


def rehearse(server: Server, limit_s: float = LIMIT_S) -> None:
    """For a server that no client asks yet. It takes `limit_s` at most, and the step in flight
    then. Where a question of one token takes a second, nothing more is asked: what comes first
    costs little beside that."""
    with startup.phase("the rehearsal"):
        deadline = time.monotonic() + limit_s
        for _ in range(2):
            begun = time.monotonic()
            _ask(server, [_question("Well?")], deadline)
            is_slow = time.monotonic() - begun > _SLOW_S
        if not is_slow:
            for requests in _rounds(server.runner):
                _ask(server, requests, deadline)
    server.begin_anew()


def _rounds(runner: Runner) -> Iterator[list[GenerationRequest]]:
    """Requests that are asked at the same time."""
    tile_size = runner.engine.tiling.image_size
    pictures = [_picture(tile_size, columns) for columns in _columns(runner)]
    beside = _question("Tell me everything.", max_new_tokens=_NUM_BESIDE, ignore_eos=True)
    yield [beside, *(_question("What is this?", (picture,)) for picture in pictures)]
    yield [_question("What is this, again?", (pictures[-1],))]
    yield [_question("Well?", max_new_tokens=2, **settings) for settings in _SETTINGS]


def _columns(runner: Runner) -> list[int]:
    """Columns of tiles of each picture. On a GPU every number of tiles has a graph of its own."""
    most = runner.engine.tiling.max_num_tiles
    return list(range(1, most + 1)) if runner.device.type == "cuda" else sorted({1, most})


def _question(
    prompt: str, images: tuple[bytes, ...] = (), *, max_new_tokens: int = 1, **settings: Any
) -> GenerationRequest:
    return GenerationRequest.images_first(
        prompt, images, system=_SYSTEM, max_new_tokens=max_new_tokens, **settings
    )


def _picture(tile_size: int, columns: int) -> bytes:
    """A JPEG file of `columns` tiles in one row, each number of them with other pixels."""
    colours = np.random.default_rng(columns).integers(256, size=(2, 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((columns * tile_size, tile_size)).save(file, "JPEG")
    return file.getvalue()


def _ask(server: Server, requests: list[GenerationRequest], deadline: float) -> None:
    """Waits for the answers until the deadline, and cancels what is left then."""
    answers: SimpleQueue[Answer] = SimpleQueue()
    tickets: list[Ticket] = []

    def listen(answer: Answer) -> None:
        if answer.is_last:
            answers.put(answer)

    num_answered = 0
    try:
        for request in requests:
            while server.is_full:
                _hear(answers, deadline)
                num_answered += 1
            if time.monotonic() > deadline:
                return
            tickets.append(server.submit(request, listen))
        while num_answered < len(tickets):
            _hear(answers, deadline)
            num_answered += 1
    except (
        Empty,
        RuntimeError,
    ):  # no time is left, or the decoder has failed: the watch reports it
        return
    finally:
        for ticket in tickets:
            server.cancel(ticket)


def _hear(answers: SimpleQueue[Answer], deadline: float) -> None:
    """A request that this engine does not take, no client asks. Raises `Empty` at the deadline."""
    answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
    if answer.error is not None and not isinstance(answer.error, UserError):
        logger.warning("a request of the rehearsal failed: %r", answer.error)
