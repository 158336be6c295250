"""How a process ended, in words: the name of the signal, and what it means here."""

from __future__ import annotations

import signal

_MEANINGS = {
    signal.SIGKILL: "killed by someone, or by the system for want of memory",
    signal.SIGSEGV: "a fault in a library's machine code",
    signal.SIGABRT: "a library gave up; the log may say why",
    signal.SIGBUS: "a file that was mapped, such as the engine's weights, became shorter meanwhile",
    signal.SIGILL: "a library was built for another CPU",
}


def how_it_ended(code: int) -> str:
    """code: as `subprocess` gives it, a negative one is the signal."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has no name
        return f"by signal {-code}"
    meaning = _MEANINGS.get(signal.Signals(-code))
    return f"by {name} ({meaning})" if meaning else f"by {name}"


def how_a_zombie_ended(stat: str) -> str | None:
    """stat: /proc/<pid>/stat of a process that is nobody's child here. None while it lives, or
    where its end cannot be read."""
    state, *fields = stat.rpartition(")")[2].split()
    if state != "Z":
        return None
    status = int(fields[48])  # proc(5): field 52, as waitpid gives it
    return how_it_ended(-(status & 0x7F) or status >> 8)
