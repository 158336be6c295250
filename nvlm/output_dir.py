"""An output directory that appears whole or not at all.

Everything is written to `<name>.partial` beside it and renamed at the end, after the manifest, so
a process killed at any moment leaves nothing that looks finished. A stale `.partial` is ours and
is cleared by the next run; a lock keeps two runs apart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nvlm import manifest
from nvlm.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_LITTLE_SPACE_BYTES = 1 << 20


@contextmanager
def staged_directory(
    final: Path, flag: str, kind: manifest.Kind, *, overwrite: bool, needed_bytes: int = 0
) -> Iterator[Path]:
    """Yields an empty directory that becomes `final` when the block ends without an error.

    `flag` names the command-line flag that gave `final`. `needed_bytes` is checked against the
    free disk before anything is written. Only a directory with our manifest of the same kind is
    ever replaced.
    """
    final = Path(os.path.realpath(final))  # behind a link: the link stays
    staging = final.with_name(final.name + ".partial")
    with ExitStack() as stack:
        try:
            check_replaceable(final, flag, kind, overwrite=overwrite)
            final.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(staging, flag))
            _clear(staging)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{flag} {final} cannot be written: {reason} ({error.filename}); choose another "
                "directory"
            ) from error
        try:
            _check_free_space(final, staging, flag, needed_bytes)
            yield staging
            check_replaceable(final, flag, kind, overwrite=overwrite)  # it may have come since
            _replace(staging, final)
        except BaseException as error:
            is_full = isinstance(error, OSError) and _is_full(error, staging)
            shutil.rmtree(staging, ignore_errors=True)
            if is_full:
                raise UserError(
                    f"the disk of {flag} {final} is full; free some space or choose another disk"
                ) from error
            raise


def check_replaceable(final: Path, flag: str, kind: manifest.Kind, *, overwrite: bool) -> None:
    """Raises `UserError` when `final` exists and may not be replaced."""
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not final.is_dir():
        raise UserError(f"{flag} {final} is a file, expected a directory or a new name")
    if not overwrite:
        raise UserError(f"{flag} {final} exists; choose another directory or add --overwrite")
    if not manifest.is_ours(final, kind):
        raise UserError(
            f"{flag} {final} has files but no {manifest.FILE_NAME} of a {kind} directory, so it is "
            "not overwritten; choose another directory"
        )


@contextmanager
def _locked(staging: Path, flag: str) -> Iterator[None]:
    staging.mkdir(exist_ok=True)
    fd = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not staging.exists() or os.fstat(fd).st_ino != staging.stat().st_ino:
            raise BlockingIOError  # another run finished and renamed it in between
        yield
    except BlockingIOError:
        raise UserError(
            f"another process is writing {staging}; wait for it or choose another {flag}"
        ) from None
    finally:
        os.close(fd)


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_full(error: OSError, staging: Path) -> bool:
    """Whether a full disk is behind an error; numpy's writer, for one, does not say so."""
    if error.errno is not None:
        return error.errno in _NO_SPACE
    return shutil.disk_usage(staging).free < _LITTLE_SPACE_BYTES


def _check_free_space(final: Path, staging: Path, flag: str, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(staging).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{flag} {final} needs {needed_bytes / 1e9:.1f} GB but its disk has "
            f"{free_bytes / 1e9:.1f} GB free; free some space or choose another disk"
        )


def _replace(staging: Path, final: Path) -> None:
    """Renames. An old `final` is moved aside first and deleted last, so that one of the two is
    whole at any moment; a killed run may leave it aside, and the next one deletes it."""
    old = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(staging, final)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    shutil.rmtree(old, ignore_errors=True)
