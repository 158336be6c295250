"""Carrying checkpoint files into an engine directory without copying their bytes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

# Another disk, a file system without links, too many of them, or not ours to link.
_NO_LINK = (errno.EXDEV, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EMLINK)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one (same disk), else a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)
