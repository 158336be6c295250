"""Mutated bodies: whatever a client sends, it is answered or refused, and never by a 500."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Listener, Ticket
from tests.support.asgi import Client

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions
from frontends.openai.requests.fields import FIELDS

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "openai_bodies.json").read_text())
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.0, 0.5, -0.0, 1e308, 10**400, 2**63, 2**64, "", "x", "1"),
    *("user", "text", "data:,", "data:image/png;base64,AAAA", "\ud800", "\x00", "𐍈" * 50),
    *([], {}, [[]], [None], ["x"], [0], {"x": 1}, {"type": "json_object"}, {"url": "data:,"}),
    *({"type": []}, {"type": {}}, [[[[[[]]]]]], {"": ""}, ["a"] * 200),
)
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/tiles", "/tokenize", "/detokenize")
MOST_TOKENS = 8
STATUSES = {200, 400, 404}


class ShortAnswers(Server):
    """The likeliest answers to nonsense are long, and a mutation may drop their limit."""

    def submit(self, request: GenerationRequest, listener: Listener) -> Ticket:
        short = min(request.max_new_tokens, MOST_TOKENS)
        return super().submit(replace(request, max_new_tokens=short), listener)


@pytest.fixture(scope="module")
def client(float32_engine_dir: Path) -> Iterator[Client]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        server = ShortAnswers(runner)
        door = Door(DoorOptions())
        door.open(server)
        with Client(application(door)) as client:
            yield client
        assert server.num_open == 0
        server.close()
        door.close()


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything within."""
    found: list[tuple[Any, Any]] = []
    keys = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in keys:
        found.append((value, key))
        if isinstance(each, (dict, list)):
            found += places(each)
    return found


def mutated(body: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(places(body) or [(body, "x")])
        value = copy.deepcopy(draw.choice(VALUES))
        match draw.randrange(5):
            case 0 if isinstance(container, dict):
                container.pop(key, None)
            case 1 if isinstance(container, dict):
                container[draw.choice(FIELDS).name] = value
            case 2 if isinstance(container, list):
                container.insert(0, value)
            case 3:
                body[draw.choice(FIELDS).name] = value
            case _:
                container[key] = value
    return body


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A byte changed, cut or doubled."""
    place = draw.randrange(len(data))
    return draw.choice(
        (
            data[:place],
            data[:place] + bytes([draw.randrange(256)]) + data[place + 1 :],
            data[:place] + data[place : place + 20] + data[place:],
        )
    )


def check(client: Client, number: int) -> None:
    draw = random.Random(number)
    recorded = draw.choice(list(RECORDED.values()))
    body = mutated({**recorded["body"], "tokens": [1, 2]}, draw)
    path = recorded["path"] if draw.random() < 0.7 else draw.choice(PATHS)
    data = json.dumps(body).encode()
    if draw.random() < 0.2:
        data = damaged(data, draw)
    reply = client.post(path, data)
    message = f"mutation {number}: {path} {data[:500]!r} gave {reply.status} {reply.body[:300]!r}"
    assert reply.status in STATUSES, message
    if reply.status != 200:
        assert reply.error["message"], message
    elif reply.headers["content-type"].startswith("text/event-stream"):
        assert b'"error":' not in reply.body, message


def test_mutated_bodies_are_answered_or_refused(client: Client) -> None:
    for number in range(600):
        check(client, number)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_mutated_bodies_are_answered_or_refused(client: Client) -> None:
    for number in range(600, 10_600):
        check(client, number)
