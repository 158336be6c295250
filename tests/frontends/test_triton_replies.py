"""The code that Triton gives a client for each way in which a request ends without an answer."""

from __future__ import annotations

import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from nvlm.program.errors import PartDiedError, UserError
from runtime.engine.mapped_files import EngineChangedError
from runtime.serving.loop import BusyError, StoppingError


class TritonError(Exception):
    CANCELLED, INTERNAL, INVALID_ARG, UNAVAILABLE = range(4)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("max_tokens is -1"), "INVALID_ARG"),
        (BusyError("busy"), "UNAVAILABLE"),
        (StoppingError("stopping"), "UNAVAILABLE"),
        (PartDiedError("a thread ended"), "UNAVAILABLE"),
        (EngineChangedError("rank0 was changed"), "UNAVAILABLE"),
        (ValueError("ours"), "INTERNAL"),
    ],
)
def test_the_code_says_whose_fault_it_is(
    error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    utils = SimpleNamespace(TritonError=TritonError, InferenceResponse=lambda error: error)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    monkeypatch.delitem(sys.modules, "frontends.triton.models.replies", raising=False)
    replies = import_module("frontends.triton.models.replies")
    assert replies.error_response(error).args[1] == getattr(TritonError, code)
    monkeypatch.delitem(sys.modules, "frontends.triton.models.replies")
