"""Modules that are importable for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def importable(modules: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """None is a module that cannot be imported. Afterwards only these are gone again: patch.dict
    would also forget what was imported in the meantime, and torch's modules cannot be imported
    twice."""
    missing = object()
    before = {name: sys.modules.get(name, missing) for name in modules}
    sys.modules.update(modules)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in before.items():
            if module is missing:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module  # type: ignore[assignment]
