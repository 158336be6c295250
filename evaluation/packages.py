"""Packages that a single task or scorer needs: a missing one is one line."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from types import ModuleType

from nvlm.program.errors import UserError


def require_package(module: str, package: str, purpose: str) -> ModuleType:
    """Imports `module`, which `package` brings."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise UserError(
            f"{purpose} needs the package {package}, which is not installed; pip install -r "
            "requirements/evaluation.txt"
        ) from None


def missing(needs: tuple[str, ...]) -> list[str]:
    """The names of those packages, and of `java`, that are missing here."""
    return [
        need
        for need in needs
        if (shutil.which(need) if need == "java" else importlib.util.find_spec(need)) is None
    ]
