"""One call of an endpoint that takes a JSON body: reads it, answers, and notices who has gone.

A handler returns an object, or an iterator of server-sent events. It is cancelled as soon as its
client closes the connection, whether it waits, streams, or has not begun.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from frontends.openai.client import ClientGoneError, read_body, unless_gone
from frontends.openai.door import Door
from frontends.openai.errors import ApiError, api_error
from frontends.openai.requests.fields import Body, placed, text_field, unknown
from nvlm.program.errors import UserError, shown
from runtime.serving.loop import BusyError

logger = logging.getLogger(__name__)

Events = AsyncGenerator[bytes, None]
_MOST_CALLS_BESIDE = 256
"""Bodies that are read beside the requests that the server takes."""
_ID_CHARACTERS = 128


@dataclass(slots=True)
class Record:
    """What the access log says of a call beside its path and status. No text and no picture."""

    request_id: str = field(default_factory=lambda: secrets.token_hex(12))  # ours
    client_request_id: str | None = None  # the header X-Request-Id, if it has one
    # Of the request, or of all prompts; None: it has no answer.
    num_prompt_tokens: int | None = None
    num_tokens: int = 0  # of all its answers
    num_tiles: int | None = None  # of all images; None: it has no answer
    finish_reason: str | None = None  # of the last answer, or cancelled
    error: str | None = None  # the code or the field that is wrong
    text: dict[str, Any] = field(default_factory=dict)  # only where the operator asks for it


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request while it is answered."""

    door: Door  # what all calls share
    body: Body  # as JSON
    record: Record  # for the access log
    stack: ExitStack  # ends with the call; what it holds is cancelled then
    created: int = field(default_factory=lambda: int(time.time()))  # Unix time in seconds

    def name(self, prefix: str) -> str:
        """The id of an answer."""
        return f"{prefix}-{self.record.request_id}"


Handler = Callable[[Call], Awaitable[dict[str, Any] | Events]]


class Endpoint:
    """An ASGI application of one handler. `fields`: whose rows of the table it reads."""

    def __init__(self, door: Door, handler: Handler, fields: str) -> None:
        self._door, self._handler, self._fields = door, handler, fields

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        door = self._door
        body: Body = {}
        door.num_calls += 1
        try:
            with ExitStack() as stack:
                body = await self._body(Request(scope, receive), stack)
                call = Call(door, body, record, stack)
                client_id = text_field(body, "request_id") or _header(scope, b"x-request-id")
                record.client_request_id = client_id and client_id[:_ID_CHARACTERS]
                ignored = unknown(body, self._fields)
                door.report_ignored(ignored)
                await unless_gone(receive, self._answer(call, ignored, scope, receive, send))
        except ClientGoneError:
            record.finish_reason = "cancelled"
        except Exception as error:
            if isinstance(error, UserError):
                error = placed(error, body, self._fields)
            await response_of(refused(error, record))(scope, receive, send)
        finally:
            door.num_calls -= 1

    async def _answer(
        self, call: Call, ignored: list[str], scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers = {"x-ignored-fields": _header_text(", ".join(ignored))} if ignored else {}
        answer = await self._handler(call)
        if isinstance(answer, dict):
            await JSONResponse(answer, headers=headers)(scope, receive, send)
            return
        async with aclosing(answer) as events:
            await _stream(events, call.record, headers, send)

    async def _body(self, request: Request, stack: ExitStack) -> Body:
        door = self._door
        if door.why_not_ready is None and door.num_calls > _MOST_CALLS_BESIDE:
            raise BusyError("the server reads as many requests as it can; try again later")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            found = f"is {shown(kind)}" if kind else "is missing"
            raise ApiError(
                415, f"the content type {found}, expected application/json; send JSON, and say so"
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "the body is compressed; send it as it is")
        return _object(await read_body(request, door, stack))


def refused(error: Exception, record: Record) -> ApiError:
    """What the client gets; the log has the traceback of what is ours."""
    refusal = api_error(error, record.request_id)
    if refusal.status == 500:
        logger.error("request %s failed", record.request_id, exc_info=error)
    record.error = refusal.code or refusal.param or f"status {refusal.status}"
    return refusal


def response_of(refusal: ApiError) -> JSONResponse:
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


async def _stream(events: Events, record: Record, headers: dict[str, str], send: Send) -> None:
    """Sends events as they come. The status waits for the first one, which may be a refusal."""
    first = await anext(events)
    sent = {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",  # nginx would collect the answer
        **headers,
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    try:
        async for event in events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
    except Exception as error:
        body = json.dumps(refused(error, record).body)
        event = f"data: {body}\n\n".encode()
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def _object(data: bytes) -> Body:
    try:
        found = json.loads(data, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not JSON: byte {error.start} is no UTF-8; send it as UTF-8"
        ) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; send a flatter one") from None
    except ValueError:  # Python's limit for the digits of a whole number
        raise ApiError(
            400, "the body has a number of too many digits; send a shorter one"
        ) from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is no JSON object but {shown(found)}; send an object")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"the body is not JSON: {name} is no number there; send one, or null")


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _header_text(text: str) -> str:
    """Names that a client made up, as a header may hold them."""
    safe = "".join(c if c.isascii() and c.isprintable() else "?" for c in text)
    return safe[:1000]
