"""TensorRT-LLM's version, and quiet importing: it and its libraries talk on stdout."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from nvlm.errors import UserError

PACKAGE = "tensorrt_llm"
SUPPORTED = "1.2"
"""The last release line with the engine workflow (builder, C++ Executor): 1.2.1."""
INSTALL = (
    'pip install "tensorrt-llm==1.2.1" from NVIDIA\'s package index, or use the image of '
    "docker/Dockerfile"
)


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def is_supported(version: str) -> bool:
    return f"{version}.".startswith(f"{SUPPORTED}.")


def load_tensorrt_llm() -> Any:
    """The module. Raises `UserError` when it is absent, broken or of another release line."""
    with stdout_to_stderr():
        try:
            module = importlib.import_module(PACKAGE)
        except (ImportError, OSError) as error:
            raise UserError(f"tensorrt_llm cannot be imported ({error}); {INSTALL}") from None
    if not is_supported(module.__version__):
        raise UserError(
            f"tensorrt_llm {module.__version__} is installed, expected {SUPPORTED}.x, the last "
            f"line that builds engines; {INSTALL}"
        )
    return module


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever is written to stdout in this block, by Python or by C++, goes to stderr."""
    if sys.stdout is not None:
        sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if sys.stdout is not None:
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
