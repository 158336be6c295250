"""Refusals as OpenAI's error object: a status, a sentence, and the field that is wrong."""

from __future__ import annotations

from typing import Any

from nvlm.program.errors import UserError, shortened
from runtime.engine.mapped_files import EngineChangedError
from runtime.serving.loop import BusyError, StoppingError

RETRY_AFTER_S = 1
MOST_CHARACTERS = 1000
"""A longer message is cut: it may quote what a client sent."""


class ApiError(Exception):
    """What a client gets instead of an answer. `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        message = " ".join(shortened(self.message).split())[:MOST_CHARACTERS]
        return {
            "error": {
                "message": message.encode(errors="replace").decode(),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class FieldError(UserError):
    """A mistake in one field of a body, which `param` names as a path: messages[0].content."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def not_ready(message: str) -> ApiError:
    """503, which clients ask again."""
    return ApiError(503, message, code="not_ready", headers={"retry-after": str(RETRY_AFTER_S)})


def api_error(error: Exception, request_id: str) -> ApiError:
    """What a client gets for an exception. For one of ours it learns only where to look."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoppingError):
        return not_ready(str(error))
    if isinstance(error, EngineChangedError):  # the operator's mistake, not the client's
        return not_ready("the server's engine was changed, and its log says how; ask another")
    if isinstance(error, BusyError):
        headers = {"retry-after": str(RETRY_AFTER_S)}
        return ApiError(429, str(error), code="queue_full", headers=headers)
    if isinstance(error, UserError):
        return ApiError(400, str(error), param=getattr(error, "param", None))
    return ApiError(500, f"the server failed; its log says why, under request {request_id}")
