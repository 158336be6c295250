"""Compiled kernels that an engine directory keeps, for machines whose cache of them is empty.

    kernels/  about.json, types.json and one folder for each of Triton's keys

A key covers the kernel's source, its constants, Triton's own code, the kind of GPU and what Triton
reads from the environment. So a kernel that does not fit is never found, and Triton compiles it
anew into the user's cache. about.json spares the copies where none would be found.

Only the GPU's code is kept. The host code that starts it is not, so an engine directory holds
nothing that a processor runs: types.json has what Triton writes that code from (launchers.py).
Files that others can write are not taken. docs/hopper.md says who makes them.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from nvlm.formats import layout
from runtime.engine.launchers import Types

logger = logging.getLogger(__name__)

_GROUP = "__grp__"
"""Begins the name of the file in which Triton lists a kernel's files, by absolute paths."""

_KEPT = (".cubin", ".json")
_PATHS = "child_paths"
_NUM_THREADS = 8

About = dict[str, str]
"""What was compiled with, and for: names and versions."""


def about_kernels(device: torch.device) -> About:
    """device: a GPU."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "machine": platform.machine(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def kernel_cache() -> Path:
    """The user's, where Triton looks."""
    from triton import knobs

    return Path(knobs.cache.dir)


def keep_kernels(cache: Path, engine_dir: Path, about: About, types: Sequence[Types] = ()) -> int:
    """Replaces an engine's kernels by those in Triton's `cache`, all at once; how many there are.
    types: of their arguments.

    Raises `OSError` where the directory cannot be written."""
    place = engine_dir / layout.KERNELS
    with tempfile.TemporaryDirectory(prefix=".kernels-", dir=engine_dir) as made:
        staging = Path(made) / layout.KERNELS
        staging.mkdir()
        for source in sorted(path for path in cache.iterdir() if path.is_dir()):
            if any(_is_kept(path.name) for path in source.iterdir()):
                _copy(source, staging / source.name, None)
        (staging / layout.ABOUT_KERNELS).write_text(json.dumps(about, indent=1))
        (staging / layout.KERNEL_TYPES).write_text(json.dumps(types))
        for path in (staging, *staging.rglob("*")):  # whatever the umask
            path.chmod(0o755 if path.is_dir() else 0o644)
        if place.exists():
            place.rename(Path(made) / "before")
        staging.rename(place)
        return len(list(place.glob("*/")))


def use_kernels(engine_dir: Path, cache: Path, about: About) -> int:
    """Copies the kernels of an engine that are missing in Triton's `cache`. Returns their number.

    It copies each key's folder at once. It copies none from an engine without kernels, with other
    ones than `about` says, or with files that others may write. Triton reports a cache that cannot
    be written.
    """
    place = engine_dir / layout.KERNELS
    try:
        kept = json.loads((place / layout.ABOUT_KERNELS).read_text())
        if kept != about:
            logger.info("the kernels of %s are for %s; here they are compiled", engine_dir, kept)
            return 0
        if (path := _foreign(place)) is not None:
            logger.warning("others can write %s: the kernels beside it are compiled anew", path)
            return 0
        sources = [path for path in sorted(place.iterdir()) if path.is_dir()]
        new = [path for path in sources if not (cache / path.name).exists()]
        if not new:
            return 0
        cache.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".nvlm-", dir=cache) as made,
            ThreadPoolExecutor(_NUM_THREADS, "nvlm-kernels") as pool,
        ):

            def copy(source: Path) -> None:
                staging, target = Path(made) / source.name, cache / source.name
                _copy(source, staging, target)
                with suppress(OSError):  # another process was faster
                    staging.rename(target)

            for _ in pool.map(copy, new):  # raises what failed
                pass
        return len(new)
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("the kernels of %s are compiled anew: %s", engine_dir, error)
        return 0


def _copy(source: Path, target: Path, final: Path | None) -> None:
    """One key's folder. Paths in its lists become names, or below `final`."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.name.startswith(_GROUP):
            names = [name for name in json.loads(path.read_text())[_PATHS] if _is_kept(name)]
            paths = {name: name if final is None else str(final / name) for name in names}
            (target / path.name).write_text(json.dumps({_PATHS: paths}))
        elif _is_kept(path.name) and path.is_file():
            shutil.copyfile(path, target / path.name)


def _is_kept(name: str) -> bool:
    return Path(name).suffix in _KEPT and Path(name).name == name


def _foreign(place: Path) -> Path | None:
    """A file or folder that somebody other than this user or root can write."""
    for path in (place, *place.rglob("*")):
        status = path.lstat()
        is_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if is_others or stat.S_ISLNK(status.st_mode) or status.st_uid not in (0, os.getuid()):
            return path
    return None
