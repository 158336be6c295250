"""What the first request of a kind pays after serve.py says "ready", and what start-up is spent on.

    python -m bench.serving.ready --engine_dir D [--before DIR] [--device cuda] [--repeats N]

Starts serve.py as a user does, N times, with another checkout's in turns where one is given. Asks
ten questions of each kind, one after the other, and times each answer's first token at the client.
Pictures differ, so that none is found in a cache. The last line is JSON.
"""

from __future__ import annotations

import base64
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image, ImageEnhance

from bench.checkout import checkout
from bench.machine import describe, describe_gpu
from bench.photos import PHOTO
from bench.serving.http_clients import Body, drive
from nvlm.program import startup
from nvlm.program.command_line import ArgumentParser, positive_int, resolve_device, run
from runtime.engine.engine_dir import EngineDir

ROOT = Path(__file__).parents[2]
NUM_QUESTIONS = 10
SIDES = (1344, 896)  # seven tiles of 448

_READY = re.compile(r"^ready: http://127\.0\.0\.1:(\d+)/v1 ", re.MULTILINE)
_START_S = 1800.0
_STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """One serve.py. ready_s: from the start of its process. spent_s: what its log says. first_ms:
    of each kind's questions, in order."""

    ready_s: float
    spent_s: dict[str, float]
    first_ms: dict[str, list[float]]


def questions() -> dict[str, list[Body]]:
    """Questions of each kind, in the order in which they are asked."""
    numbers = range(NUM_QUESTIONS)
    return {
        "picture": [
            _body([_picture(i), {"type": "text", "text": "What is this?"}]) for i in numbers
        ],
        "text": [_body(f"What is {i} and {i}?") for i in numbers],
        "drawn": [_body(f"Name {i} things.", temperature=1.0, top_p=0.9, seed=i) for i in numbers],
        "penalties": [_body(f"Say {i} words.", frequency_penalty=0.5) for i in numbers],
        "JSON": [_body(f"Give {i}.", response_format={"type": "json_object"}) for i in numbers],
    }


def start_and_ask(root: Path, flags: list[str]) -> Start:
    with TemporaryDirectory() as folder, _serving(root, flags, Path(folder) / "log") as served:
        process_s, port, log = served
        first_ms = {
            kind: [drive(port, [body], 1)[0].first_ms for body in bodies]
            for kind, bodies in questions().items()
        }
        return Start(process_s, startup.spent(log.read_text()), first_ms)


@contextmanager
def _serving(root: Path, flags: list[str], log: Path) -> Iterator[tuple[float, int, Path]]:
    """Seconds until it is ready, its port, its log."""
    words = [sys.executable, "serve.py", "--port", "0", "--access_log", "none", *flags]
    begun = time.perf_counter()
    with open(log, "wb") as stderr:
        process = subprocess.Popen(words, cwd=root, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        while not (ready := _READY.search(log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.perf_counter() < begun + _START_S, "serve.py is not ready"
            time.sleep(0.02)
        yield time.perf_counter() - begun, int(ready[1]), log
    finally:
        process.terminate()
        process.wait(_STOP_S)


def _body(content: Any, **fields: Any) -> Body:
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 4, "stream": True, **fields}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(number: int) -> dict[str, Any]:
    """A part of a message: one photograph in another brightness."""
    photo = Image.open(PHOTO).convert("RGB").resize(SIDES)
    file = io.BytesIO()
    ImageEnhance.Brightness(photo).enhance(0.6 + 0.08 * number).save(file, "JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def _summary(starts: list[Start]) -> dict[str, Any]:
    """Medians over the starts."""
    rows: dict[str, Any] = {"ready_s": statistics.median([start.ready_s for start in starts])}
    rows["spent_s"] = {
        name: statistics.median([start.spent_s[name] for start in starts])
        for name in starts[0].spent_s
    }
    for kind in starts[0].first_ms:
        first = statistics.median([start.first_ms[kind][0] for start in starts])
        tenth = statistics.median([start.first_ms[kind][-1] for start in starts])
        rows[kind] = {"first_ms": first, "tenth_ms": tenth, "ratio": first / tenth}
    return rows


def _print(name: str, rows: dict[str, Any]) -> None:
    print(f"{name}: ready after {rows['ready_s']:.1f} s")
    for phase, seconds in rows["spent_s"].items():
        print(f"  {phase:<24}{seconds:8.2f} s")
    print(f"  {'first token':<24}{'first':>8}{'tenth':>8}{'ratio':>8}")
    for kind, row in rows.items():
        if isinstance(row, dict) and "ratio" in row:
            times = f"{row['first_ms']:8.1f}{row['tenth_ms']:8.1f}{row['ratio']:8.2f}"
            print(f"  {kind + ', ms':<24}{times}")


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--before", type=checkout, help="another checkout, to compare with")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=positive_int, default=3, help="starts of each")
    given = parser.parse_args()
    EngineDir.read(given.engine_dir)  # refuses what serve.py would refuse, in one line
    flags = ["--engine_dir", str(given.engine_dir.resolve()), "--device", given.device]
    roots = {"after": ROOT}
    if given.before is not None:
        roots = {"before": given.before, **roots}
    starts: dict[str, list[Start]] = {name: [] for name in roots}
    for _ in range(given.repeats):
        for name, root in roots.items():
            starts[name].append(start_and_ask(root, flags))
    found: dict[str, Any] = {"machine": describe() | describe_gpu(resolve_device(given.device))}
    for name in roots:
        found[name] = _summary(starts[name])
        _print(name, found[name])
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    run(main)
