"""The host code that launches an engine's kernels, compiled before it is asked for.

Triton writes it from the types of a kernel's arguments, and has the machine's compiler make a
module of it where a kernel is first launched: one after another, some 0.2 s each. An engine keeps
those types, which are data, so that all modules are compiled at once, beside loading. Where this
fails, Triton does as before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sysconfig
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Types = tuple[str, ...]
"""Triton's names of the types of a kernel's arguments, in order."""

_TYPE = re.compile(r"\*?\w+")
_LAUNCHER, _UTILITIES = "__triton_launcher", "cuda_utils"


@contextmanager
def recording() -> Iterator[list[Types]]:
    """The types of every kernel that is compiled or found inside, each once, the first first."""
    from triton import knobs

    found: dict[Types, None] = {}
    recorded: list[Types] = []
    before = knobs.compilation.listener

    def listen(*, src: Any, **event: Any) -> None:
        types = tuple(src.signature.values())
        if _are_types(types) and types not in found:
            found[types] = None
            recorded.append(types)
        if before is not None:
            before(src=src, **event)

    knobs.compilation.listener = listen
    try:
        yield recorded
    finally:
        knobs.compilation.listener = before


def read_types(path: Path) -> list[Types]:
    """What `recording` found, as JSON. Empty where there is no such file, or another one."""
    try:
        lists = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(lists, list) or not all(map(_are_types, lists)):
        return []
    return [tuple(types) for types in lists]


def compile_beside(kernels: Iterable[Types]) -> threading.Thread:
    """Starts a thread that has them in Triton's cache when it ends."""
    thread = threading.Thread(target=_compile_all, args=[list(kernels)], name="nvlm-launchers")
    thread.start()
    return thread


def hash_triton_beside() -> None:
    """Starts a thread that hashes Triton's 400 MB, which Triton's keys have in them. Triton asks
    for it at its first kernel, and keeps it."""
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # another version
        return
    threading.Thread(target=triton_key, name="nvlm-triton-key").start()


def _are_types(types: Any) -> bool:
    """Triton's descriptors of tensors have other launchers."""
    return isinstance(types, (list, tuple)) and all(
        isinstance(each, str) and _TYPE.fullmatch(each) is not None for each in types
    )


def _compile_all(kernels: list[Types]) -> None:
    try:
        from triton.backends.nvidia import driver

        sources = {
            driver.make_launcher({}, dict(enumerate(types)), None): _LAUNCHER for types in kernels
        }
        utilities = Path(driver.dirname, "driver.c").read_text()
        num_new = int(_compile(utilities, _UTILITIES))  # alone: a compiler that fails says so once
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "nvlm-launchers") as pool:
            num_new += sum(pool.map(_compile, sources, sources.values()))
        logger.debug("%d modules that launch kernels were compiled", num_new)
    except Exception as error:
        logger.debug("what launches kernels is compiled where it is needed: %r", error)


def _compile(source: str, name: str) -> bool:
    """As Triton's `compile_module_from_src`, but for the import. Whether it was missing."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import _build, platform_key
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256((source + platform_key()).encode()).hexdigest())
    file_name = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if cache.get_file(file_name) is not None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.c"
        path.write_text(source)
        places = driver.library_dirs(), driver.include_dirs, driver.libraries
        built = _build(name, str(path), folder, *places, [])
        cache.put(Path(built).read_bytes(), file_name, binary=True)
    return True
