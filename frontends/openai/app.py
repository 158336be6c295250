"""The ASGI application: which path goes to which endpoint, and what stands before all of them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import nvlm
from frontends.openai.access_log import AccessLog
from frontends.openai.call import Endpoint, Handler, response_of
from frontends.openai.cors import Cors
from frontends.openai.door import Door
from frontends.openai.endpoints.chat import chat_completions
from frontends.openai.endpoints.completions import completions
from frontends.openai.endpoints.models import model_entry, model_list
from frontends.openai.endpoints.tiles import tiles
from frontends.openai.endpoints.tokenize import detokenize, tokenize
from frontends.openai.errors import ApiError, not_ready
from frontends.openai.guard import Guard
from frontends.openai.metrics import CONTENT_TYPE, exposition
from frontends.openai.openapi import document
from frontends.openai.page.document import page

_ENDPOINTS: tuple[tuple[str, Handler, str], ...] = (
    ("/v1/chat/completions", chat_completions, "chat"),
    ("/v1/completions", completions, "completions"),
    ("/v1/tiles", tiles, "tiles"),
    ("/tokenize", tokenize, "tokenize"),
    ("/detokenize", detokenize, "detokenize"),
)


def application(door: Door, guard: Guard | None = None) -> ASGIApp:
    """guard: who may ask; None is everybody."""

    async def health(_: Request) -> Response:
        if (why := door.why_not_ready) is not None:
            raise not_ready(why)
        return Response()

    async def models(_: Request) -> Response:
        return JSONResponse(model_list(door))

    async def model(request: Request) -> Response:
        return JSONResponse(model_entry(door, request.path_params["model"]))

    async def version(_: Request) -> Response:
        return JSONResponse({"version": nvlm.__version__})

    async def metrics(_: Request) -> Response:
        return Response(exposition(door), media_type=CONTENT_TYPE)

    async def openapi(_: Request) -> Response:
        return JSONResponse(document())

    async def looked_at(_: Request) -> Response:
        return page()

    app = Starlette(
        routes=[
            *(
                Route(path, Endpoint(door, handler, fields), methods=["POST"])
                for path, handler, fields in _ENDPOINTS
            ),
            Route("/", looked_at),
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/health", health),
            Route("/ping", health, methods=["GET", "POST"]),
            Route("/version", version),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
        ],
        exception_handlers={ApiError: _refusal, HTTPException: _http_refusal},
    )
    app.router.redirect_slashes = False
    return guarded(app, guard or Guard())


def guarded(app: ASGIApp, guard: Guard) -> ASGIApp:
    """An application as clients reach it: with its access log, and after the guard."""
    return AccessLog(Cors(_Guarded(app, guard), guard))


class _Guarded:
    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._guard.check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            scope["state"]["record"].error = error.code
            await response_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.state.record.error = error.code
    return response_of(error)


async def _http_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is no such path", 405: "this path takes another method"}
    message = (
        f"{messages.get(error.status_code, error.detail)}: {request.method} {request.url.path}"
    )
    return response_of(ApiError(error.status_code, message, headers=dict(error.headers or {})))
