"""`run.py --input_file` with photographs: one checkout of this project beside another.

    python -m bench.cpu.batch --engine_dir D [--before DIR] [--num_requests N] [--repeats N]
        [--max_new_tokens N] [--step_ms MS]

Starts run.py as a user does, in this checkout and in the one `--before` names, in turn, so that a
busy machine slows both. Seconds count from the loaded engine to the last answer. With --step_ms a
decoder that computes nothing and takes so long a step stands in for the engine's, as a GPU beside
this CPU would; its answers mean nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkout import checkout
from bench.machine import describe
from bench.photos import write_photos

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("batch_driver.py")


@dataclass(frozen=True, slots=True)
class Batch:
    engine_dir: Path
    requests: Path
    max_new_tokens: int
    step_ms: float


@dataclass(frozen=True, slots=True)
class Taken:
    seconds: float
    texts: list[str]


def write_requests(folder: Path, number: int) -> Path:
    lines = [
        json.dumps({"id": path.stem, "prompt": "What is in the cup?", "images": [path.name]})
        for path in write_photos(folder, number)
    ]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "requests.jsonl"


def measure(checkout: Path, batch: Batch, answers: Path) -> Taken:
    """One run in a process of its own; raises where a request fails."""
    answers.unlink(missing_ok=True)
    answers.with_name(answers.name + ".run.json").unlink(missing_ok=True)
    run = (
        *("--engine_dir", batch.engine_dir, "--device", "cpu"),
        *("--input_file", batch.requests, "--output_file", answers),
        *("--max_new_tokens", batch.max_new_tokens),
    )
    done = subprocess.run(
        [sys.executable, *map(str, (DRIVER, checkout, batch.step_ms, *run))],
        cwd=checkout,
        stdout=subprocess.PIPE,
        check=True,
    )
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    return Taken(float(done.stdout.split()[-1]), [line["text"] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--before", type=checkout, help="another checkout, to compare with")
    parser.add_argument("--num_requests", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--step_ms", type=float, default=0.0, help="of a decoder double")
    arguments = parser.parse_args()
    checkouts = [ROOT] if arguments.before is None else [arguments.before, ROOT]
    with tempfile.TemporaryDirectory() as folder:
        requests = write_requests(Path(folder), arguments.num_requests)
        batch = Batch(
            arguments.engine_dir.resolve(), requests, arguments.max_new_tokens, arguments.step_ms
        )
        rounds = [
            [measure(checkout, batch, Path(folder) / "answers.jsonl") for checkout in checkouts]
            for _ in range(arguments.repeats)
        ]
    seconds = [[taken.seconds for taken in column] for column in zip(*rounds, strict=True)]
    medians = [statistics.median(column) for column in seconds]
    result: dict[str, Any] = {
        "machine": describe(),
        "num_requests": arguments.num_requests,
        "max_new_tokens": arguments.max_new_tokens,
        "step_ms": arguments.step_ms,
        "seconds": seconds[-1],
        "median_s": medians[-1],
        "load_average": os.getloadavg()[0],
    }
    print(f"batch    {medians[-1]:8.2f} s, {arguments.num_requests / medians[-1]:.2f} requests/s")
    if arguments.before is not None:
        result |= {
            "before_seconds": seconds[0],
            "before_median_s": medians[0],
            "after_by_before": statistics.median(
                after.seconds / before.seconds for before, after in rounds
            ),
            "same_answers": all(before.texts == after.texts for before, after in rounds),
        }
        print(f"before   {medians[0]:8.2f} s, {arguments.num_requests / medians[0]:.2f} requests/s")
        verdict = "the same answers" if result["same_answers"] else "OTHER ANSWERS"
        print(f"ratio    {result['after_by_before']:8.3f}, the middle one of the pairs; {verdict}")
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
