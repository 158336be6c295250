"""Another checkout of this project, to compare with."""

from __future__ import annotations

import argparse
from pathlib import Path


def checkout(text: str) -> Path:
    """The flag `--before`: an absolute path. Refuses a folder that is no checkout."""
    path = Path(text).resolve()
    if not (path / "run.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} has no run.py; give the root of a checkout")
    return path
