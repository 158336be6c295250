"""The ASGI application that clients reach: checks who asks, reads the body, and hands both to the
replica that the router chooses.

A replica that dies is 503: the request is not given to another, which it may kill too. A stream
that has begun ends with an `error` event.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontends.openai.app import guarded
from frontends.openai.call import Record, refused, response_of
from frontends.openai.client import ClientGoneError, read_body, unless_gone
from frontends.openai.door import Door, DoorOptions
from frontends.openai.errors import ApiError, not_ready
from frontends.openai.guard import Guard
from frontends.openai.metrics import CONTENT_TYPE
from frontends.ray_serve.affinity import affinity_key
from frontends.ray_serve.metrics import merged
from frontends.ray_serve.replica import Asked, Head

log = logging.getLogger(__name__)

_PLACE_S = 5.0
"""Seconds in which a replica must take a request. None does while all are being started."""
_METRICS_S = 5.0
_NOT_PASSED = frozenset(
    {"connection", "content-length", "expect", "host", "origin", "transfer-encoding"}
)
"""Host and Origin are checked here; the rest is a connection's own."""


def application(replicas: DeploymentHandle[Any], options: DoorOptions, guard: Guard) -> ASGIApp:
    return _InRaysProxy(guarded(_Ingress(replicas, options), guard))


class _InRaysProxy:
    """What Ray asks of an application beside answers: the messages of its life, and no header
    `x-request-id`, which its proxy adds to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for name in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{name}.complete"})
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.get("headers", ())
                message["headers"] = [each for each in headers if each[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, sending)


class _Ingress:
    def __init__(self, replicas: DeploymentHandle[Any], options: DoorOptions) -> None:
        self._replicas = replicas
        self._door = Door(options)  # bounds what is read; the engine is a replica's

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        request = Request(scope, receive)
        record.client_request_id = request.headers.get("x-request-id")
        self._door.num_calls += 1
        try:
            with ExitStack() as stack:
                if scope["path"] == "/metrics":
                    await self._metrics(send)
                    return
                body = await read_body(request, self._door, stack)
                await unless_gone(receive, self._forward(request, body, send))
        except ClientGoneError:
            record.finish_reason = "cancelled"
        except Exception as error:
            await response_of(refused(error, record))(scope, receive, send)
        finally:
            self._door.num_calls -= 1

    async def _forward(self, request: Request, body: bytes, send: Send) -> None:
        headers = (each for each in request.headers.items() if each[0] not in _NOT_PASSED)
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        asked = Asked(request.method, path, tuple(headers), body)
        handle = self._replicas.options(stream=True, session_id=affinity_key(body) or "")
        pieces: Any = handle.answer.remote(asked)  # a generator, as `stream` says
        has_begun = is_whole = False
        try:
            head = await _head(pieces)
            await send(_start(head))
            has_begun = True
            async for data in pieces:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            is_whole = True
        except (RayError, DeploymentUnavailableError) as error:
            log.error("a replica was lost: %s", error)
            lost = not_ready("the replica that had this request was lost; ask again")
            if not has_begun:
                raise lost from None
            event = f"data: {json.dumps(lost.body)}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            if not is_whole:
                pieces.cancel()
        await send({"type": "http.response.body", "body": b""})

    async def _metrics(self, send: Send) -> None:
        pages: list[tuple[str, str]] = []
        with suppress(RayError, DeploymentUnavailableError, TimeoutError):
            found = await self._replicas.broadcast("metrics").results_async(
                timeout_s=_METRICS_S, return_exceptions=True
            )
            pages = [each for each in found if isinstance(each, tuple)]
        headers = [(b"content-type", CONTENT_TYPE.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": merged(pages)})


async def _head(pieces: AsyncIterator[Any]) -> Head:
    """The beginning of an answer. Raises `ApiError` where no replica takes the request."""
    try:
        async with asyncio.timeout(_PLACE_S):
            await anext(pieces)
    except TimeoutError:
        raise not_ready("no replica is ready; try again later") from None
    except BackPressureError:
        raise ApiError(429, "every replica's queue is full; try again later") from None
    head = await anext(pieces)
    assert isinstance(head, Head), "a replica begins with it"
    return head


def _start(head: Head) -> Message:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
    return {"type": "http.response.start", "status": head.status, "headers": raw}
