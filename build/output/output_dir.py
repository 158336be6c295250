"""An output directory that appears whole or not at all.

Everything is written to `<name>.partial` beside it and renamed at the end, after the manifest, so
a process killed at any moment leaves nothing that looks finished. A stale `.partial` of ours is
resumed or cleared by the next run (a marker shows that it is not a user's); a lock keeps two runs
apart. Hidden files in it are scaffolding and go before it gets its name.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nvlm.formats import layout, manifest
from nvlm.program.errors import UserError
from nvlm.program.locks import lock

log = logging.getLogger(__name__)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_LITTLE_SPACE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class OutputPlace:
    """Where a directory is to appear."""

    path: Path  # as the user gave it
    flag: str  # the command-line flag that said so
    kind: manifest.Kind  # of what will stand there
    overwrite: bool  # whether one that stands there is replaced

    @property
    def name(self) -> str:
        return f"{self.flag} {self.path}"

    @property
    def final(self) -> Path:
        """The folder that a link leads to; the link stays."""
        return Path(os.path.realpath(self.path))

    @property
    def staging(self) -> Path:
        return layout.staging(self.final)

    @property
    def replaced(self) -> Path:
        return layout.replaced(self.final)


@contextmanager
def staged_directory(
    place: OutputPlace,
    needed_bytes: int = 0,
    is_worth_keeping: Callable[[Path], bool] = lambda _: False,
) -> Iterator[Path]:
    """Yields a directory that becomes `place` when the block ends without an error.

    It is empty, or holds what an earlier run left that `is_worth_keeping`. An interrupted run
    leaves it under the same condition, one that met bad input never. `needed_bytes` is checked
    against the free disk before anything is written. Only a directory with our manifest of the
    same kind is ever replaced.
    """
    with ExitStack() as stack:
        try:
            check_replaceable(place)
            staging = place.staging
            place.final.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(place))
            _claim(place)
            if not is_worth_keeping(staging):
                _clear(staging)
        except OSError as error:
            with suppress(OSError, ValueError):
                place.staging.rmdir()  # made just now, if it is empty
            if (refusal := _no_room(place, error)) is not None:
                raise refusal from error
            raise UserError(
                f"{place.name} cannot be written: {error.strerror or error} ({error.filename}); "
                "choose another directory"
            ) from error
        is_at_work = False
        try:
            _check_free_space(place, needed_bytes)
            is_at_work = True
            yield staging
            is_at_work = False
            check_replaceable(place)  # something may have come there since
            _replace(place)
        except BaseException as error:
            refusal = _no_room(place, error) if isinstance(error, OSError) else None
            is_bad_input = is_at_work and isinstance(error, UserError)
            if not is_bad_input and is_worth_keeping(staging):
                log.warning("%s keeps what is done; the same command resumes with it", staging)
            else:
                shutil.rmtree(staging, ignore_errors=True)
            if refusal is not None:
                raise refusal from error
            raise


def check_replaceable(place: OutputPlace) -> None:
    """Raises `UserError` when the place is taken and may not be replaced."""
    final = place.final
    if final.is_mount() or not final.name:
        raise UserError(f"{place.name} is a mount point; give a directory inside it")
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not final.is_dir():
        raise UserError(f"{place.name} is a file, expected a directory or a new name")
    if not place.overwrite:
        raise UserError(f"{place.name} exists; choose another directory or add --overwrite")
    if not manifest.is_ours(final, place.kind):
        raise UserError(
            f"{place.name} has files but no {layout.MANIFEST} of "
            f"{manifest.with_article(place.kind)} directory, so it is not overwritten; choose "
            "another directory"
        )


@contextmanager
def _locked(place: OutputPlace) -> Iterator[None]:
    staging = place.staging
    staging.mkdir(exist_ok=True)
    fd = os.open(staging, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        lock(fd, str(staging))
        if not staging.exists() or os.fstat(fd).st_ino != staging.stat().st_ino:
            raise BlockingIOError  # another run finished and renamed it in between
        yield
    except BlockingIOError:
        raise UserError(
            f"another process is writing {staging}; wait for it or choose another {place.flag}"
        ) from None
    finally:
        os.close(fd)


def _claim(place: OutputPlace) -> None:
    """Marks the staging directory as ours. Raises `UserError` if it holds a user's files."""
    staging = place.staging
    is_ours = (staging / layout.UNFINISHED).is_file() or manifest.is_ours(staging, place.kind)
    if any(staging.iterdir()) and not is_ours:
        raise UserError(
            f"{staging} has files that this program did not write; move them or choose another "
            f"{place.flag}"
        )
    (staging / layout.UNFINISHED).touch()


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != layout.UNFINISHED:
            path.unlink()


def _no_room(place: OutputPlace, error: OSError) -> UserError | None:
    """The error to raise for a full disk or too large a file; None for other errors."""
    is_full, is_too_large = error.errno in _NO_SPACE, error.errno == errno.EFBIG
    if error.errno is None:  # numpy's writer, for one, does not say so
        is_full = shutil.disk_usage(place.staging).free < _LITTLE_SPACE_BYTES
        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        is_too_large = not is_full and most != resource.RLIM_INFINITY
    if is_too_large:
        return UserError(
            f"{place.name} cannot be written: a file would be larger than its file system or "
            "`ulimit -f` allows; choose another disk or raise the limit"
        )
    if not is_full:
        return None
    return UserError(f"the disk of {place.name} is full; free some space or choose another disk")


def _check_free_space(place: OutputPlace, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(place.staging).free
    files = [path for path in place.staging.rglob("*") if path.is_file()]
    needed_bytes -= sum(512 * path.stat().st_blocks for path in files)  # an earlier run wrote them
    if needed_bytes > free_bytes:
        raise UserError(
            f"{place.name} needs {_size(needed_bytes)} but its disk has {_size(free_bytes)} free; "
            "free some space or choose another disk"
        )


def _size(num_bytes: int) -> str:
    """`num_bytes` in the largest unit that does not round it to nothing."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size / 10:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def _replace(place: OutputPlace) -> None:
    """Renames. What was there is moved aside first and deleted last, so that one of the two is
    whole at any moment; a killed run may leave it aside, and the next one deletes it."""
    final = place.final
    if final.exists():
        shutil.rmtree(place.replaced, ignore_errors=True)
        os.rename(final, place.replaced)
    scaffolding = place.staging.glob(".*")
    for path in sorted(scaffolding, key=lambda path: path.name == layout.UNFINISHED):
        path.unlink()
    os.rename(place.staging, final)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    shutil.rmtree(place.replaced, ignore_errors=True)
