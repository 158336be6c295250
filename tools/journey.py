"""Counts the files that one question enters on its way to an answer.

    python -m tools.journey --engine_dir DIR [--image FILE] [--checkout DIR] [--list]

Runs the checkout's run.py under a profile function and counts calls by file, in all threads.
run.py itself is not counted: it is where the question comes from.
A change of file is a call whose file is not that of the thread's call before it.
Imports nothing of the project: another checkout's modules are loaded instead of this one's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

IMAGE = Path("examples/scan_1642.png")
QUESTION = ("--prompt", "Read the number.", "--max_new_tokens", "8")


@dataclass(slots=True)
class Journey:
    """The calls below `root`, which ends with a separator."""

    root: str
    calls: Counter[str] = field(default_factory=Counter)  # by file, relative to root
    num_changes: int = 0
    last: dict[int, str] = field(default_factory=dict)  # by thread: the file of its last call

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        """Counts one event; the form of `sys.setprofile`'s function."""
        code = frame.f_code
        if event != "call" or code.co_name == "<module>":
            return
        if not code.co_filename.startswith(self.root) or ".venv" in code.co_filename:
            return
        name = code.co_filename[len(self.root) :]
        self.calls[name] += 1
        thread = threading.get_ident()
        self.num_changes += self.last.get(thread) != name
        self.last[thread] = name

    def line(self) -> str:
        return (
            f"files {len(self.calls)}, changes of file {self.num_changes}, "
            f"calls {self.calls.total()}"
        )


def ask(checkout: Path, engine_dir: Path, image: Path) -> Journey:
    """Runs run.py of `checkout` on one question. Changes this process's folder, path and argv."""
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    sys.argv = ["run.py", "--engine_dir", str(engine_dir), "--image", str(image), *QUESTION]
    sys.argv += ["--device", "cpu"]
    journey = Journey(f"{checkout}{os.sep}")
    threading.setprofile(journey.profile)
    sys.setprofile(journey.profile)
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
            runpy.run_path("run.py", run_name="__main__")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return journey


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--engine_dir", type=Path, required=True, help="made by build_engine.py")
    add("--image", type=Path, default=IMAGE, help=f"the picture (default {IMAGE})")
    add("--checkout", type=Path, default=Path(), help="whose run.py (default: this folder's)")
    add("--list", action="store_true", help="print the calls of each file too")
    given = parser.parse_args()
    paths = (given.checkout.resolve(), given.engine_dir.resolve(), given.image.resolve())
    journey = ask(*paths)
    print(journey.line())
    if given.list:
        for name, count in sorted(journey.calls.items()):
            print(f"{count:7d} {name}")


if __name__ == "__main__":
    main()
