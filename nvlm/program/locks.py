"""Locks that keep two runs from writing one file or directory, where the file system has them."""

from __future__ import annotations

import errno
import fcntl
import logging

log = logging.getLogger(__name__)

_NO_LOCKS = (
    *(errno.ENOSYS, errno.EOPNOTSUPP),  # Lustre without `-o flock`, some of FUSE
    errno.ENOLCK,  # NFS without its lock service
    errno.EBADF,  # NFS, of a directory: its locks are of files open for writing
)


def lock(descriptor: int, name: str) -> None:
    """Locks an open file or directory until it is closed, or this process ends.

    Raises `BlockingIOError` while another process holds it. Where the file system has no locks, a
    warning says so and the program runs without.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "%s lies on a file system without locks (flock: %s): nothing keeps a second run off; "
            "start one at a time",
            *(name, error.strerror),
        )
