"""Clients of the HTTP server that measure: each asks question after question on one connection."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer. first_ms: until its first event, or the whole where it is not streamed."""

    first_ms: float
    num_prompt_tokens: int
    num_tokens: int
    num_characters: int
    num_events: int


def drive(port: int, bodies: Iterable[Body], num_streams: int) -> list[Answered]:
    """Asks all of them, `num_streams` at a time."""
    rest, answers = iter(bodies), list[Answered]()

    async def all_of_them() -> None:
        await asyncio.gather(*(_client(port, rest, answers) for _ in range(num_streams)))

    asyncio.run(all_of_them())
    return answers


class Clients:
    """`drive` in a process of its own: the server's threads wait for none of its. A context."""

    def __init__(self, port: int, num_streams: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve_clients, args=(port, num_streams, theirs))

    def __enter__(self) -> Clients:
        self._process.start()
        assert self._pipe.recv() == "ready"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._pipe.send([])
        else:
            self._process.kill()
        self._process.join(30)

    def ask(self, bodies: list[Body]) -> tuple[list[Answered], float]:
        """The answers, and the seconds from the first question to the last answer."""
        self._pipe.send(bodies)
        found: tuple[list[Answered], float] = self._pipe.recv()
        return found


def _serve_clients(port: int, num_streams: int, pipe: Connection) -> None:
    pipe.send("ready")
    while bodies := pipe.recv():
        begun = time.perf_counter()
        answers = drive(port, bodies, min(num_streams, len(bodies)))
        pipe.send((answers, time.perf_counter() - begun))


async def _client(port: int, bodies: Iterator[Body], answers: list[Answered]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    for body in bodies:
        data = json.dumps(body).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        begun = time.perf_counter()
        writer.write(head.encode() + data)
        headers = await reader.readuntil(b"\r\n\r\n")
        if body.get("stream"):
            assert headers.startswith(b"HTTP/1.1 200"), headers
            answers.append(await _read_events(reader, begun))
            continue
        length = int(headers.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        content = await reader.readexactly(length)
        assert headers.startswith(b"HTTP/1.1 200"), content
        answer, first_ms = json.loads(content), 1e3 * (time.perf_counter() - begun)
        text = answer["choices"][0]["message"]["content"]
        answers.append(Answered(first_ms, *_used(answer["usage"]), len(text), 1))
    writer.close()


async def _read_events(reader: asyncio.StreamReader, begun: float) -> Answered:
    """A stream whose last event is its usage."""
    first_ms, num_characters, num_events, used = 0.0, 0, 0, (0, 0)
    while (size := int(await reader.readline(), 16)) > 0:
        chunk = (await reader.readexactly(size + 2))[:-2]
        first_ms = first_ms or 1e3 * (time.perf_counter() - begun)
        for event in chunk.split(b"\n\n"):
            if not event.startswith(b"data: {"):
                continue
            data = json.loads(event[6:])
            num_events += len(data["choices"])
            num_characters += sum(len(each["delta"]["content"]) for each in data["choices"])
            if (usage := data.get("usage")) is not None:
                used = _used(usage)
    await reader.readline()
    return Answered(first_ms, *used, num_characters, num_events)


def _used(usage: Body) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]
