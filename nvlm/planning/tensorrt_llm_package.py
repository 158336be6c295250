"""TensorRT-LLM's version, and quiet importing: it and its libraries talk on stdout."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from nvlm.program.errors import UserError

PACKAGE = "tensorrt_llm"
SUPPORTED = "1.2.1"
"""The last release with the engine workflow (builder, C++ Executor), and the one whose settings
these are."""
INSTALL = (
    f'pip install "tensorrt-llm=={SUPPORTED}" from NVIDIA\'s package index, or use the image of '
    "docker/Dockerfile"
)


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def installed_version() -> str | None:
    """Without importing it, which takes seconds; None where it came without pip's records."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_supported(version: str) -> bool:
    """ "1.2.1+cu130" is 1.2.1 too."""
    return version.partition("+")[0] == SUPPORTED


def load_tensorrt_llm() -> Any:
    """The module. Raises `UserError` when it is absent, broken or of another version."""
    with stdout_to_stderr():
        try:
            module = importlib.import_module(PACKAGE)
        except (ImportError, OSError) as error:
            raise UserError(f"tensorrt_llm cannot be imported ({error}); {INSTALL}") from None
    if not is_supported(module.__version__):
        raise UserError(
            f"tensorrt_llm {module.__version__} is installed, expected {SUPPORTED}, the last "
            f"that builds engines; {INSTALL}"
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
