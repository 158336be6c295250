"""One line of JSON for each request: what was asked and how it ended, without text and pictures."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontends.openai.call import Record
from nvlm.program.errors import UserError

access = logging.getLogger("frontends.openai.access")

_QUIET = {"/health", "/ping", "/metrics"}
"""Asked every few seconds: logged only where they fail."""


def open_log(name: str) -> None:
    """`name`: a file, which is appended to; - for stderr, none for no log."""
    access.propagate = False
    access.setLevel(logging.INFO)
    if name == "none":
        access.setLevel(logging.CRITICAL)
        return
    try:
        handler = logging.StreamHandler() if name == "-" else logging.FileHandler(name)
    except OSError as error:
        raise UserError(f"--access_log {name} cannot be written: {error.strerror}") from None
    handler.setFormatter(logging.Formatter("%(message)s"))
    access.handlers = [handler]


class AccessLog:
    """ASGI middleware. Gives every request its `Record`, and its id to the answer's header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, record, status = time.perf_counter(), Record(), 499  # nginx's: the client has gone
        scope["state"] = {**scope.get("state", {}), "record": record}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", record.request_id.encode())
                message["headers"] = [*message.get("headers", ()), own]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception:  # uvicorn answers, and logs why
            status = 500
            raise
        finally:
            if scope["path"] not in _QUIET or status >= 400:
                access.info(_line(scope, record, status, time.perf_counter() - begun))


def _line(scope: Scope, record: Record, status: int, seconds: float) -> str:
    client = scope.get("client")
    values: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "client_request_id": record.client_request_id,
        "client": client and client[0],
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "seconds": round(seconds, 4),
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_tokens": record.num_tokens or None,
        "num_tiles": record.num_tiles,
        "finish_reason": record.finish_reason,
        "error": record.error,
        **record.text,
    }
    return json.dumps({name: value for name, value in values.items() if value is not None})
