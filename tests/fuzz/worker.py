"""One process that tries cases of one kind and says how each ended, a letter each.

    python -m tests.fuzz.worker KIND SEED SECONDS FOLDER

`begin` stands before each case. So its starter knows which case a process ended in, or hangs in.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import pickle
import sys
import time
import traceback
from hashlib import sha256
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from nvlm.program.process import ignore_pillows_warnings
from tests.fuzz.kind import Opened, is_refused
from tests.fuzz.kinds import KINDS

READY, BEGIN, ACCEPTED, REFUSED, FAULT, PANIC = b"!", b"(", b"a", b"r", b"x", b"p"
_ROUND = 100
"""Cases of one run of hypothesis, after which the time is looked at."""

_FRAMES = 4


def main() -> int:
    name, first_seed, seconds, folder = sys.argv[1:]
    faulthandler.enable(file=open(os.devnull, "w"))  # noqa: SIM115 - no input on stderr
    ignore_pillows_warnings()
    logging.disable(logging.CRITICAL)
    place = Path(folder)
    opened = KINDS[name].open(place)
    os.write(1, READY)
    end = time.monotonic() + float(seconds)
    number = int(first_seed)
    while time.monotonic() < end:
        _round(opened, number, end, place)
        number += 1
    return 0


def _round(opened: Opened, number: int, end: float, place: Path) -> None:
    @seed(number)
    @settings(
        max_examples=_ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(opened.cases)
    def try_one(case: Any) -> None:
        if time.monotonic() > end:
            return
        os.write(1, BEGIN)
        os.write(1, _outcome(opened, case, place))

    try_one()


def _outcome(opened: Opened, case: Any, place: Path) -> bytes:
    try:
        return REFUSED if is_refused(opened, case) else ACCEPTED
    except Exception as error:
        _report(error, case, place)
        return FAULT
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        return PANIC


def _report(error: Exception, case: Any, place: Path) -> None:
    """One line for the campaign; the case itself stays in the campaign's folder."""
    frames = [
        f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    ]
    kept = place.parent / f"{place.name}-{sha256(repr(frames).encode()).hexdigest()[:8]}.pickle"
    if not kept.exists():
        kept.write_bytes(pickle.dumps(case))
    fault = {"error": f"{type(error).__name__}: {error}"[:200], "frames": frames, "case": kept.name}
    print(json.dumps(fault), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
