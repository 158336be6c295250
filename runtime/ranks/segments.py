"""MPICH's shared memory loses its name once every rank has mapped it, so a killed rank leaves none.

MPICH 4 and 5 make one file a job, /dev/shm/mpich_shm_<number>_<number> of 2 MB and more, and remove
it in `MPI_Finalize`, which a killed rank never reaches.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_SEGMENT = re.compile(r"/dev/shm/mpich_shm_[0-9a-f]+_\d+")


def forget_segments(maps: Path = Path("/proc/self/maps")) -> None:
    """Removes the names of what this process maps; the memory stays until the last rank ends. For
    when MPI has started on every rank: then nobody opens them by name any more."""
    with suppress(OSError):
        fields = [line.split(maxsplit=5) for line in maps.read_text(errors="replace").splitlines()]
        paths = {field[5].strip() for field in fields if len(field) > 5}
        for path in filter(_SEGMENT.fullmatch, paths):
            with suppress(OSError):  # another rank was faster
                Path(path).unlink()
