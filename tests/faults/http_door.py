"""What clients do to serve.py under load: whole answers and streams, what is wrong, hanging up."""

from __future__ import annotations

import http.client
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bench.serving.soak import JSON_TYPE, PATH, WRONG, Question, ask_alone, bodies
from tests.faults.load import GoneError
from tests.support.http_server import Served

ANSWER_S = 120
_LONG: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me everything."}],
    "max_tokens": 60,
    "ignore_eos": True,
}


class HttpDoor:
    """Clients of one server, which is asked alone first for what it answers."""

    def __init__(self, served: Served, number: int, seed: int) -> None:
        self._port = served.port
        self._asked = [ask_alone(served, body) for body in bodies(number, random.Random(seed))]
        self.deeds: dict[str, Callable[[random.Random], str | None]] = {
            "valid, whole": self._whole,
            "valid, stream": self._stream,
            "invalid": self._invalid,
            "hung up": self._hung_up,
        }

    def _whole(self, choice: random.Random) -> str | None:
        question = choice.choice(self._asked)
        with self._asking(json.dumps(question.body).encode()) as response:
            answer = json.loads(response.read())
        return _differs([each["message"]["content"] for each in answer["choices"]], question)

    def _stream(self, choice: random.Random) -> str | None:
        question = choice.choice(self._asked)
        with self._asking(json.dumps({**question.body, "stream": True}).encode()) as response:
            events = response.read().decode().split("\n\n")
        found = [event.removeprefix("data: ") for event in events if event]
        if not found or found[-1] != "[DONE]" or any('"error"' in each for each in found):
            raise GoneError(str(found[-1:]))
        texts = [""] * len(question.alone)
        for each in (each for event in found[:-1] for each in json.loads(event)["choices"]):
            texts[each["index"]] += each["delta"]["content"]
        return _differs(texts, question)

    def _invalid(self, choice: random.Random) -> str | None:
        data, status = choice.choice(WRONG)
        with self._asking(data) as response:
            body = response.read()
        if response.status != status:
            return f"{response.status} {body[:200]!r} for {data[:80]!r}"
        return None

    def _hung_up(self, choice: random.Random) -> str | None:
        with suppress(GoneError), self._asking(json.dumps({**_LONG, "stream": True}).encode()):
            time.sleep(choice.random() * 0.05)
        return None

    @contextmanager
    def _asking(self, data: bytes) -> Iterator[http.client.HTTPResponse]:
        """Raises `GoneError` where the connection ends, and for an error of the server's own."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
        try:
            connection.request("POST", PATH, data, JSON_TYPE)
            response = connection.getresponse()
            if response.status >= 500:
                raise GoneError(f"{response.status} {response.read()[:200]!r}")
            yield response
        except (ConnectionError, http.client.HTTPException) as error:
            raise GoneError(repr(error)) from None
        finally:
            connection.close()


def _differs(found: list[str], question: Question) -> str | None:
    return None if found == question.alone else f"{found} is not {question.alone}"
