"""What Triton is given for a request, and the line of the log that says how it ended."""

from __future__ import annotations

import logging
from typing import Any

import triton_python_backend_utils as pb_utils

from frontends.triton.response import output_arrays
from nvlm.program.errors import PartDiedError, UserError
from runtime.engine.mapped_files import EngineChangedError
from runtime.requests.types import Answer, GenerationResult
from runtime.serving.loop import BusyError

logger = logging.getLogger(__name__)

_MOST_LOGGED = 500  # characters of a refusal


class CancelledError(Exception):
    """The client cancelled the request, or went away."""


# Triton adds to its module only after a model is imported: nothing of it is read before that.
def send_last(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _error(message: str, code: str) -> Any:
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    return pb_utils.InferenceResponse(error=error)


def response_of(answer: Answer, outputs: frozenset[str], *, whole: bool) -> Any:
    """A piece of an answer, or the `whole`, as Triton's response with the tensors `outputs`."""
    if answer.error is not None:
        return error_response(answer.error)
    arrays = output_arrays(answer, whole=whole)
    tensors = [pb_utils.Tensor(name, arrays[name]) for name in arrays if name in outputs]
    return pb_utils.InferenceResponse(output_tensors=tensors)


def log_end(name: str, end: GenerationResult | Exception | None) -> None:
    """One line a request: how it ended. A traceback of ours follows it."""
    if isinstance(end, GenerationResult):
        logger.info(
            "request %s: %s after %d tokens, %d of prompt, %d tiles, %.2f s",
            *(name, end.finish_reason, end.num_tokens, end.num_prompt_tokens, end.num_tiles),
            end.timings.total_ms / 1e3,
        )
    elif isinstance(end, CancelledError):
        logger.info("request %s: cancelled", name)
    elif isinstance(end, PartDiedError):
        logger.error("request %s: failed: %s", name, end)
    elif isinstance(end, UserError):
        logger.info("request %s: refused: %s", name, " ".join(str(end).split())[:_MOST_LOGGED])
    else:
        logger.error("request %s: failed", name, exc_info=end)


def error_response(error: Exception) -> Any:
    """A code and a sentence."""
    if isinstance(error, CancelledError):
        return _error("cancelled by the client", "CANCELLED")
    if isinstance(
        error, BusyError | EngineChangedError | PartDiedError
    ):  # another server, or this one soon
        return _error(str(error), "UNAVAILABLE")
    if isinstance(error, UserError):
        return _error(str(error), "INVALID_ARG")
    return _error(f"{type(error).__name__}: {error}", "INTERNAL")
