"""Runs a command and samples the memory that is its own: RssAnon + RssShmem.

Pages of files that it maps (the model's weights) belong to the page cache and are left out.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_INTERVAL_S = 0.05
_OWN = ("RssAnon:", "RssShmem:")


@dataclass(frozen=True, slots=True)
class Measured:
    """cpu_seconds: of all threads, user and system; on a busy machine they say more."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    log: str


def run_measured(command: Sequence[str], *, cwd: Path | None = None) -> Measured:
    """Raises `CalledProcessError` with what the command printed, if it fails."""
    start, cpu_start = time.perf_counter(), _children_cpu_seconds()
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output) as process:
            peak = 0
            while process.poll() is None:
                peak = max(peak, own_bytes(process.pid))
                time.sleep(_INTERVAL_S)
        seconds = time.perf_counter() - start
        output.seek(0)
        log = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, log)
    return Measured(seconds, _children_cpu_seconds() - cpu_start, peak, log)


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def own_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line.split() for line in status.splitlines()]
    return sum(1024 * int(line[1]) for line in lines if line and line[0] in _OWN)
