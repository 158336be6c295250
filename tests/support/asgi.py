"""Asks an ASGI application as an HTTP server would, in this process, on its own event loop."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

WAIT_S = 60


@dataclass(slots=True)
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object, whose form is checked."""
        body = self.json()
        assert set(body) == {"error"}, body
        error: dict[str, Any] = body["error"]
        assert set(error) == {"message", "type", "param", "code"}, body
        return error

    def events(self) -> list[dict[str, Any]]:
        """Events of a stream, which must have ended as it should."""
        *events, last, rest = self.body.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", ""), self.body
        assert all(event.startswith("data: ") for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]


class Open:
    """A call that was begun. `leave` closes its connection."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.reply = Reply()
        self.future: Future[None]
        self.has_left = asyncio.Event()

    def leave(self) -> None:
        self._client.loop.call_soon_threadsafe(self.has_left.set)

    def wait(self) -> Reply:
        self.future.result(WAIT_S)
        return self.reply


class Client:
    """A context that ends its event loop."""

    def __init__(self, app: Any, host: str = "localhost:8000") -> None:
        self._app, self._host = app, host
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.begin("GET", path, b"", headers).wait()

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.begin_post(path, body, **headers).wait()

    def begin_post(self, path: str, body: Any, **headers: str) -> Open:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.begin("POST", path, data, {"content_type": "application/json", **headers})

    def begin(self, method: str, path: str, data: bytes, headers: Mapping[str, str]) -> Open:
        """`_` in a header's name stands for `-`."""
        call = Open(self)
        given = {"host": self._host, **{k.replace("_", "-"): v for k, v in headers.items()}}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": b"",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        call.future = asyncio.run_coroutine_threadsafe(
            _call(self._app, scope, data, call), self.loop
        )
        return call


async def _call(app: Any, scope: dict[str, Any], data: bytes, call: Open) -> None:
    is_sent = False

    async def receive() -> dict[str, Any]:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            return {"type": "http.request", "body": data, "more_body": False}
        await call.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if call.has_left.is_set():
            return
        if message["type"] == "http.response.start":
            assert call.reply.status == 0, "the status is sent once"
            call.reply.status = message["status"]
            call.reply.headers = {k.decode(): v.decode("latin-1") for k, v in message["headers"]}
        else:
            call.reply.chunks.append(message.get("body", b""))

    await app(scope, receive, send)
