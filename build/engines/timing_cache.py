"""TensorRT's timings between builds: a folder with one file for vision and one for the decoder."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from nvlm.program.errors import UserError


def check_writable(file: Path) -> None:
    """Raises `UserError` where a cache could not be written after hours of compiling.

    Tries it, since root may write where permissions say no and not in /proc; leaves nothing.
    """
    made = []
    try:
        for directory in reversed((file.parent, *file.parent.parents)):
            if not os.path.lexists(directory):
                directory.mkdir()
                made.append(directory)
        if file.exists():
            with open(file, "rb+"):
                pass
        else:
            tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(
            f"--timing_cache {file.parent} cannot be written: {error.strerror or error} "
            f"({error.filename}); choose another folder"
        ) from None
    finally:
        for directory in reversed(made):
            with suppress(OSError):  # another build's cache may be in it by now
                directory.rmdir()
