"""The soaks of both servers at the same time, each a program of its own: `make soak MINUTES=N`.

    python -m tests.faults.both --engine_dir D --minutes N

What each found is a line of JSON with its name. Exit code 1: not all of it held.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nvlm.program.command_line import ArgumentParser, positive_float, run


def run_together(commands: Mapping[str, Sequence[str]]) -> int:
    """1 where any of them ended with another code than 0; the others continue to their end."""
    started: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, words in commands.items():
            started[name] = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        with ThreadPoolExecutor(len(started)) as pool:
            printed = list(pool.map(lambda process: process.communicate()[0], started.values()))
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait()
    for (name, process), found in zip(started.items(), printed, strict=True):
        print(f"{name}: {found.strip()}", flush=True)
        if process.returncode:
            print(f"{name} ended with code {process.returncode}", file=sys.stderr)
    return int(any(process.returncode for process in started.values()))


def main() -> int:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine_dir", type=Path, required=True, help="of serve.py")
    parser.add_argument("--minutes", type=positive_float, default=10.0)
    given = parser.parse_args()
    minutes = ("--minutes", str(given.minutes))
    python = (sys.executable, "-m")
    return run_together(
        {
            "triton": (*python, "tests.faults.soak", *minutes),
            "serve.py": (
                *(*python, "bench.serving.soak"),
                *("--engine_dir", str(given.engine_dir), *minutes),
            ),
        }
    )


if __name__ == "__main__":
    run(main)
