"""`make fuzz`: tries cases of every kind for some minutes and counts how they ended.

Faults are tracebacks of ours and what was accepted and should not have been. A process that ends
by a signal did so in outside software: such ends are counted apart, and their input is not kept.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.kinds import KINDS
from tests.fuzz.worker import ACCEPTED, BEGIN, PANIC, READY, REFUSED

HANG_S = 20.0
_START_S = 180.0
_SHARES = {"pictures": 3.0, "videos": 2.0}
"""Shares of the time; 1 for the others."""


@dataclass
class Tally:
    """What became of the cases of one kind."""

    kind: str
    accepted: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # by where they were raised
    hangs: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # of outside software, by signal
    peak_bytes: int = 0

    @property
    def cases(self) -> int:
        return self.accepted + self.refused + self.faults.total() + self.hangs + self.ends.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, help="a JSON file of the counts")
    arguments = parser.parse_args()
    shares = {kind: _SHARES.get(kind, 1.0) for kind in arguments.kinds}
    seconds = arguments.minutes * 60 * arguments.workers / sum(shares.values())
    folder = Path(tempfile.mkdtemp(prefix="nvlm_fuzz_"))
    print(f"seed {arguments.seed}, cases of faults in {folder}", file=sys.stderr)
    with ThreadPoolExecutor(arguments.workers) as pool:
        # The longest first, so that the workers end together.
        kinds = sorted(shares, key=lambda kind: -shares[kind])
        tried = [
            pool.submit(try_kind, kind, arguments.seed * 1000, seconds * shares[kind], folder)
            for kind in kinds
        ]
        tallies = [each.result() for each in tried]
    print(table(tallies))
    if arguments.output:
        arguments.output.write_text(json.dumps([_json(tally) for tally in tallies], indent=2))
    return int(any(tally.faults or tally.hangs for tally in tallies))


def try_kind(kind: str, seed: int, seconds: float, folder: Path) -> Tally:
    """Starts a worker, and another where one ended or hung, until the time is over."""
    tally = Tally(kind)
    left = seconds
    attempt = 0
    while left > 1:
        place = folder / f"{kind}-{attempt}"
        place.mkdir()
        left -= _run_worker(tally, seed + 100 * attempt, left, place)
        attempt += 1
    print(f"{kind}: {tally.cases} cases", file=sys.stderr, flush=True)
    return tally


def _run_worker(tally: Tally, seed: int, seconds: float, place: Path) -> float:
    """Returns how long it tried cases."""
    log = place.with_suffix(".stderr")
    command = [sys.executable, "-m", "tests.fuzz.worker", tally.kind, str(seed), str(seconds)]
    with (
        open(log, "wb") as stderr,
        subprocess.Popen([*command, str(place)], stdout=subprocess.PIPE, stderr=stderr) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        selector.register(process.stdout, selectors.EVENT_READ)
        begun = None
        is_trying, heard = False, time.monotonic()
        while True:
            letters = os.read(process.stdout.fileno(), 4096) if selector.select(1.0) else None
            tally.peak_bytes = max(tally.peak_bytes, _peak(process.pid))
            now = time.monotonic()
            if letters == b"":
                break
            if letters:
                heard = now
                begun = now if READY in letters else begun
                tally.accepted += letters.count(ACCEPTED)
                tally.refused += letters.count(REFUSED)
                if PANIC in letters:
                    tally.ends["a panic"] += letters.count(PANIC)
                is_trying = letters.endswith(BEGIN)
            elif now - heard > (HANG_S if is_trying else _START_S):
                process.kill()
                tally.hangs += 1
                is_trying = False
    _add_faults(tally, log)
    if process.returncode < 0 and is_trying:
        tally.ends[f"signal {-process.returncode}"] += 1
    elif begun is None or process.returncode > 0:
        raise RuntimeError(f"the worker of {tally.kind} failed: {log.read_text()[-2000:]}")
    return time.monotonic() - (begun or heard)


def _add_faults(tally: Tally, log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"error"'):
            fault = json.loads(line)
            tally.faults[f"{fault['error']} at {' < '.join(reversed(fault['frames']))}"] += 1


def _peak(process_id: int) -> int:
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except OSError:
        return 0
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return next(found, 0)


def table(tallies: list[Tally]) -> str:
    """Markdown: a row a kind, and the sum."""
    rows = [
        "| kind | cases | refused | accepted | faults | hangs > 20 s | outside ends | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    total = Tally("all")
    for tally in sorted(tallies, key=lambda each: list(KINDS).index(each.kind)):
        rows.append(_row(tally))
        total.accepted += tally.accepted
        total.refused += tally.refused
        total.faults += tally.faults
        total.ends += tally.ends
        total.hangs += tally.hangs
        total.peak_bytes = max(total.peak_bytes, tally.peak_bytes)
    rows.append(_row(total))
    faults = [f"{number} x {fault}" for fault, number in total.faults.most_common()]
    return "\n".join([*rows, *faults])


def _row(tally: Tally) -> str:
    ends = ", ".join(f"{number} by {name}" for name, number in tally.ends.items()) or "0"
    return (
        f"| {tally.kind.replace('_', ' ')} | {tally.cases:,} | {tally.refused:,} | "
        f"{tally.accepted:,} | {tally.faults.total()} | {tally.hangs} | {ends} | "
        f"{tally.peak_bytes / 1e6:.0f} MB |"
    )


def _json(tally: Tally) -> dict[str, object]:
    return {
        "kind": tally.kind,
        "cases": tally.cases,
        "refused": tally.refused,
        "accepted": tally.accepted,
        "faults": dict(tally.faults),
        "hangs": tally.hangs,
        "ends_of_outside_software": dict(tally.ends),
        "peak_bytes": tally.peak_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
