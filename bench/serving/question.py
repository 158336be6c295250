"""One question through run.py: tokens a second of this checkout, beside another's in turns.

    python -m bench.serving.question --engine_dir D [--before DIR] [--device cuda] [--repeats N]

Starts run.py as a user does, so two versions compare whatever their modules are called. The answer
is drawn at a high temperature, since a trained model's own would end too soon. The rate is
run.py's, of the tokens after the first. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.checkout import checkout
from bench.machine import describe, describe_gpu
from nvlm.program.command_line import resolve_device

ROOT = Path(__file__).parents[2]


def ask(checkout: Path, flags: list[str]) -> dict[str, Any]:
    """run.py's JSON of one question in a process of its own."""
    done = subprocess.run(
        [sys.executable, "run.py", "--prompt", "Say something long.", "--json", *flags],
        cwd=checkout,
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--before", type=checkout, help="another checkout, to compare with")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--seed", type=int, default=5)
    given = parser.parse_args()
    flags = {
        "--engine_dir": given.engine_dir.resolve(),
        "--device": given.device,
        "--temperature": 20,
        "--seed": given.seed,
        "--max_new_tokens": given.max_new_tokens,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    checkouts = {"after": ROOT}
    if given.before is not None:
        checkouts = {"before": given.before, **checkouts}
    rounds = [
        {name: ask(checkout, words) for name, checkout in checkouts.items()}
        for _ in range(given.repeats)
    ]
    found: dict[str, Any] = {"machine": describe() | describe_gpu(resolve_device(given.device))}
    for name in checkouts:
        rates = [answers[name]["timings"]["decode_tokens_per_s"] for answers in rounds]
        found[name] = {"tokens_per_s": rates, "median": statistics.median(rates)}
        print(f"{name:<8}{statistics.median(rates):10.1f} tokens/s")
    texts = {answers[name]["text"] for answers in rounds for name in checkouts}
    found |= {"num_tokens": rounds[0]["after"]["num_tokens"], "same_answers": len(texts) == 1}
    print(f"{found['num_tokens']} tokens, the same answers: {found['same_answers']}")
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
