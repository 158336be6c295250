"""Paths for the Python of Triton's backend, which takes file names for ASCII in any locale."""

from __future__ import annotations

from pathlib import Path


def in_ascii(directory: Path, link: Path) -> Path:
    """Returns `directory`, or a `link` to it, which it makes, where its path is not ASCII."""
    if str(directory).isascii():
        return directory
    link.symlink_to(directory)
    return link
