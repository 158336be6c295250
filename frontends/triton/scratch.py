"""The folder of a server that runs. One that was killed leaves it: the next start removes it.

A lock says whether the owner lives. tritonserver inherits it, and so does the process of each
model: the folder is in use until the last of them has ended.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "nvlm_triton_"
_OWNER = "owner"  # locked, and the prefix of the server's regions in shared memory
_REGIONS = re.compile(r"nvlm_\d+_[0-9a-f]{16}_")
_SHARED = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Scratch:
    """A folder for one run of the server."""

    path: Path  # removed at the end
    regions: str  # prefix of its regions in shared memory
    lock: int  # a descriptor, for processes that use the folder to inherit


@contextmanager
def scratch_folder() -> Iterator[Scratch]:
    """A new one, after those of dead servers were removed; it is removed at the end."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    # Under its own name only once it is locked: another start must not take it for abandoned.
    made = Path(tempfile.mkdtemp(prefix="nvlm_new_", dir=parent))
    folder = made.with_name(PREFIX + made.name.removeprefix("nvlm_new_"))
    regions = f"nvlm_{os.getpid()}_{secrets.token_hex(8)}_"
    lock = os.open(made / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, regions.encode())
        made.rename(folder)
        yield Scratch(folder, regions, lock)
    finally:
        for each in (made, folder):
            shutil.rmtree(each, ignore_errors=True)
        os.close(lock)


def remove_abandoned(parent: Path) -> None:
    """Folders of our own user whose lock nobody holds, with their regions of shared memory. What
    has no lock is not this program's to judge."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
                continue
            lock = os.open(folder / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_regions(os.read(lock, 200).decode(errors="replace"))
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def remove_regions(prefix: str) -> None:
    """Removes the shared memory of a server that has ended."""
    if _REGIONS.fullmatch(prefix):
        for region in _SHARED.glob(f"{prefix}*"):
            region.unlink(missing_ok=True)
