"""Seconds from the start of run.py's process to its first token, and what they are spent on.

    python -m bench.serving.start --folder D [--device cuda] [--before DIR] [--repeats N]

Asks the trained small model about a photograph. Its FP8 engine is made in the folder where it is
missing, and on a GPU its kernels are compiled and kept there first. Each start is a process of its
own: with an empty cache of Triton's, so that the kernels come from the engine, and with the cache
that the start before left. Another checkout's run.py takes turns where one is given; it opens the
same engine. One more start of each kind says what it spent on what. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.checkout import checkout
from bench.hopper.truth import engine_in
from bench.machine import describe, describe_gpu
from bench.photos import PHOTO
from nvlm.program import startup
from nvlm.program.command_line import ArgumentParser, positive_int, resolve_device, run

ROOT = Path(__file__).parents[2]
_QUESTION = ["--image", str(PHOTO), "--prompt", "What is this?", "--streaming"]
_WAYS = ("Triton's cache empty", "Triton's cache full")

_TRACED = """
import logging, sys, time
from nvlm.program import startup
logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
startup.show()
startup.took("the interpreter", startup.process_age_s())
with startup.phase("importing torch"):
    import torch
with startup.phase("importing the rest"):
    import run
if "cuda" in sys.argv:
    with startup.phase("the GPU's context"):
        torch.zeros(1, device="cuda").item()
opens, streams = run.Runner.open, run.Runner.stream

def opened(*given, **named):
    begun = time.perf_counter()
    runner = opens(*given, **named)
    startup.took("opening, all phases of it", time.perf_counter() - begun)
    return runner

def streamed(*given, **named):
    begun = time.perf_counter()
    pieces = streams(*given, **named)
    piece = next(pieces)
    startup.took("the first token", time.perf_counter() - begun)
    startup.took("everything to the first token", startup.process_age_s())
    yield piece
    for piece in pieces:
        yield piece
    timings = piece.result.timings
    startup.took("of the first token: tiles", timings.tiling_ms / 1e3)
    startup.took("of the first token: vision", timings.vision_ms / 1e3)
    startup.took("of the first token: prompt", timings.prefill_ms / 1e3)
    startup.took("the tokens after it", timings.decode_ms / 1e3)

run.Runner.open, run.Runner.stream = opened, streamed
sys.argv[0] = "run.py"
run.run(run.main)
"""


def first_token_s(root: Path, flags: list[str], cache: Path) -> tuple[float, str]:
    """Seconds from the start of a process to what it first prints, and all that it prints."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "run.py", *_QUESTION, *flags],
        cwd=root,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    seconds = time.perf_counter() - begun
    rest, _ = process.communicate()
    assert process.returncode in (0, 1), f"run.py in {root} failed"  # 1: cut at the last token
    return seconds, (first + rest).decode()


def spent_s(flags: list[str], cache: Path) -> dict[str, float]:
    """Seconds of each phase of a start."""
    done = subprocess.run(
        [sys.executable, "-c", _TRACED, *_QUESTION, *flags],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    return startup.spent(done.stderr)


def measure(roots: dict[str, Path], flags: list[str], repeats: int) -> dict[str, Any]:
    """Starts by checkout and way, and what this one spent on what."""
    times: dict[str, dict[str, list[float]]] = {name: {way: [] for way in _WAYS} for name in roots}
    texts: set[str] = set()
    with TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        for _ in range(repeats):
            for name, root in roots.items():
                shutil.rmtree(cache, ignore_errors=True)
                for way in _WAYS:
                    seconds, text = first_token_s(root, flags, cache)
                    times[name][way].append(seconds)
                    texts.add(text)
                    print(f"{name:<8}{way:<24}{seconds:8.2f} s", flush=True)
        shutil.rmtree(cache, ignore_errors=True)
        spent = {way: spent_s(flags, cache) for way in _WAYS}
    for way, phases in spent.items():
        print(way)
        for phase, seconds in phases.items():
            print(f"    {phase:<32}{seconds:8.2f} s")
    medians = {
        name: {way: statistics.median(each) for way, each in ways.items()}
        for name, ways in times.items()
    }
    print(f"the same answers: {len(texts) == 1}")
    return {
        "first_token_s": times,
        "median_s": medians,
        "spent_s": spent,
        "same_answers": len(texts) == 1,
    }


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--before", type=checkout, help="another checkout, to compare with")
    parser.add_argument("--repeats", type=positive_int, default=3, help="starts of each kind")
    given = parser.parse_args()
    device = resolve_device(given.device)
    engine = engine_in(given.folder.resolve()).directory
    flags = ["--engine_dir", str(engine), "--device", device.type, "--max_new_tokens", "8"]
    found: dict[str, Any] = {"machine": describe() | describe_gpu(device)}
    if device.type == "cuda":
        begun = time.perf_counter()
        words = [sys.executable, "-m", "runtime.serving.compile_kernels", *flags[:4]]
        subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, check=True)
        found["compiling_s"] = time.perf_counter() - begun
        print(f"compiling and keeping kernels{found['compiling_s']:8.2f} s", flush=True)
    roots = {"after": ROOT}
    if given.before is not None:
        roots = {"before": given.before, **roots}
    found |= measure(roots, flags, given.repeats)
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    run(main)
