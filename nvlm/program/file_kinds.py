"""Paths that are no regular files: pipes and devices. Reading one may never end."""

from __future__ import annotations

import os
from pathlib import Path


def is_pipe_or_device(path: Path) -> bool:
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def is_device(path: Path) -> bool:
    """A pipe is none: what writes to it ends, as in `<(...)`."""
    return os.path.exists(path) and (path.is_char_device() or path.is_block_device())
