"""Lets pages of the origins that the operator named ask from a browser (CORS). No other may."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontends.openai.guard import Guard

_PREFLIGHT = {
    "access-control-allow-methods": "GET, POST",
    "access-control-max-age": "600",
}


class Cors:
    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if origin is None or origin not in self._guard.origins:
            await self._app(scope, receive, send)
            return
        allowed = {"access-control-allow-origin": origin, "vary": "Origin"}
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            # OpenAI's package for browsers adds a dozen headers of its own.
            asked = headers.get("access-control-request-headers", "authorization, content-type")
            allowed |= {**_PREFLIGHT, "access-control-allow-headers": asked}
            await Response(status_code=204, headers=allowed)(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in allowed.items()]
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        await self._app(scope, receive, sending)
