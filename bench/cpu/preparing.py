"""Pictures a second that threads prepare, and what a decoder's thread beside them waits for.

    python -m bench.cpu.preparing [--threads 1 2 4] [--seconds S]

Each thread reads a picture as the HTTP server does: JSON, base64, JPEG, tiles, cache key. The
decoder's thread stands for a GPU's: it sleeps as long as a step takes, then runs Python for a
moment. How much longer a step takes than it must is what it waited for: Python's lock, or a core.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from bench.machine import describe
from bench.photos import PHOTO
from nvlm.inputs.images import make_of_pages
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.picture_source import decode_base64
from nvlm.inputs.tiling import Tiler
from nvlm.program.command_line import positive_float, positive_int

SIZES = {"1.2 megapixels": (1344, 896), "12 megapixels": (4000, 3000)}
_ORIENTATION, _QUARTER_TURN = 0x0112, 6  # EXIF, as a phone that is held upright writes it
DEVICE_S = 0.010  # of a step, in which the decoder's thread needs no lock
_HOST_LOOPS = 2_000  # then it runs Python, for some 0.1 ms
_TILER = Tiler(448, 6)


@dataclass(frozen=True, slots=True)
class Row:
    """late_ms: of steps, beyond what they take with nothing beside them. cpu_ms: of a picture."""

    picture: str
    threads: int
    pictures_per_s: float
    cpu_ms: float
    late_ms: dict[str, float]


def body_of(size: tuple[int, int], *, is_turned: bool = False) -> bytes:
    """A request's body with a photograph of `size` as it is stored."""
    file, metadata = io.BytesIO(), Image.Exif()
    if is_turned:
        metadata[_ORIENTATION] = _QUARTER_TURN
    photo = Image.open(PHOTO).convert("RGB").resize(size)
    photo.save(file, "JPEG", quality=90, exif=metadata)
    return json.dumps({"url": base64.b64encode(file.getvalue()).decode()}).encode()


def prepare(body: bytes, budget: PictureBudget) -> bytes:
    """The cache key of its tiles."""
    data = decode_base64(json.loads(body)["url"].encode(), "the picture")
    (tiled,) = make_of_pages(_TILER, data, budget=budget)
    return tiled.cache_key


def measure(name: str, body: bytes, threads: int, seconds: float, must_s: float) -> Row:
    """must_s: what a step takes with nothing beside it."""
    budget, counts, stops = PictureBudget(), [0] * threads, threading.Event()

    def work(index: int) -> None:
        while not stops.is_set():
            prepare(body, budget)
            counts[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    begun, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    late = [1e3 * (taken - must_s) for taken in steps(seconds)]
    stops.set()
    for worker in workers:
        worker.join()
    took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    number = sum(counts)
    percentiles = {f"p{q}": float(np.percentile(late, q)) for q in (50, 90, 99)}
    return Row(name, threads, number / took, 1e3 * cpu / max(1, number), percentiles)


def steps(seconds: float) -> list[float]:
    """Seconds that each step of the decoder's thread takes."""
    taken, end = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        time.sleep(DEVICE_S)
        total = 0
        for number in range(_HOST_LOOPS):
            total += number
        taken.append(time.perf_counter() - begun)
    return taken


def _table(rows: list[Row], write: Callable[[str], Any]) -> None:
    head = ("pictures/s", "CPU ms each", "late p50", "p90", "p99, ms")
    write(f"{'picture':<24}{'threads':>8}" + "".join(f"{word:>12}" for word in head))
    for row in rows:
        numbers = (row.pictures_per_s, row.cpu_ms, *row.late_ms.values())
        write(f"{row.picture:<24}{row.threads:>8}" + "".join(f"{n:>12.2f}" for n in numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=positive_int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seconds", type=positive_float, default=5.0, help="of each row")
    parser.add_argument("--switch_ms", type=positive_float, help="Python's interval (default: 5)")
    given = parser.parse_args()
    if given.switch_ms is not None:
        sys.setswitchinterval(given.switch_ms / 1e3)
    must_s = statistics.median(steps(given.seconds))
    bodies = {name: body_of(size) for name, size in SIZES.items()}
    bodies |= {f"{name}, turned": body_of(SIZES[name], is_turned=True) for name in SIZES}
    rows = [
        measure(name, body, threads, given.seconds, must_s)
        for name, body in bodies.items()
        for threads in given.threads
    ]
    print(f"a step alone: {1e3 * must_s:.2f} ms")
    _table(rows, print)
    found = {"machine": describe(), "step_ms": 1e3 * must_s, "rows": [asdict(row) for row in rows]}
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
