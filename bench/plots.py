"""Draws what bench/hopper.py and bench/hopper_peers.py measured, for docs/.

    python -m bench.plots --results us=h100.json transformers=peers.json --output docs/hopper.svg

Milliseconds per layer: of decode steps by batch size, and of prompts by length, beside what each
file's own ceilings allow. A file of one number of layers has no slope; its steps are divided by
their layers, head and sampling included.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.hopper_decoder import prefill_flop, step_bytes
from bench.synthetic_engine import DECODERS
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.command_line import ArgumentParser, run
from nvlm.errors import UserError

matplotlib.rcParams["svg.hashsalt"] = "nvlm"  # the same results give the same bytes

Point = tuple[int, int]
"""Batch size, context or prompt."""


def read_results(named: list[str]) -> dict[str, dict[str, Any]]:
    """`name=file` each. Raises `UserError` for what holds no results."""
    found = {}
    for text in named:
        name, _, path = text.partition("=")
        try:
            lines = Path(path).read_text().strip()
            values = json.loads(lines if lines.startswith("{") else lines.splitlines()[-1])
            points(values, "decode")
            points(values, "prefill")
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise UserError(
                f"{text!r} names no results; give name=file with the output of bench.hopper"
            ) from None
        found[name] = values
    return found


def points(values: dict[str, Any], phase: str) -> dict[Point, float]:
    """Milliseconds per layer."""
    if values["slopes"]:
        rows = [(row, row["ms_per_layer"]) for row in values["slopes"]]
    else:
        rows = [(row, row["ms"] / row["num_layers"]) for row in values["rows"]]
    return {(row["batch_size"], row["num_tokens"]): ms for row, ms in rows if row["phase"] == phase}


def floor(ceilings: dict[str, float], phase: str, point: Point) -> float:
    """Milliseconds of a layer at the copy rate, or at the rate of FP8 products."""
    batch_size, num_tokens = point
    one, two = (
        CheckpointConfig(replace(DECODERS["72b"], num_hidden_layers=n), "bfloat16", "FP8", "FP8")
        for n in (1, 2)
    )
    if phase == "prefill":
        flop = prefill_flop(two, num_tokens) - prefill_flop(one, num_tokens)
        return 1e3 * flop / ceilings["fp8_flop_per_s"]
    moved = step_bytes(two, batch_size, num_tokens) - step_bytes(one, batch_size, num_tokens)
    return 1e3 * moved / ceilings["copy_bytes_per_s"]


def draw(results: dict[str, dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        found = {name: points(values, phase) for name, values in results.items()}
        every = sorted({point for each in found.values() for point in each})
        width = 0.8 / len(found)
        for i, (name, each) in enumerate(found.items()):
            places = [every.index(point) + (i + 0.5) * width - 0.4 for point in each]
            bars = axes.bar(places, list(each.values()), width, label=name)
            axes.bar_label(bars, fmt="%.3f", fontsize="x-small", padding=1)
            ends = [(place - 0.45 * width, place + 0.45 * width) for place in places]
            floors = [floor(results[name]["ceilings"], phase, point) for point in each]
            is_last = i == len(found) - 1
            label = "at the run's measured ceiling" if is_last else None
            axes.hlines(floors, *zip(*ends, strict=True), "black", "dashed", label=label)
        if phase == "decode":
            names = [f"{batch_size}" for batch_size, _ in every]
            axes.set_xlabel(f"batch size, at {every[0][1]:,} tokens of context")
        else:
            names = [f"{num_tokens:,}" for _, num_tokens in every]
            axes.set_xlabel("tokens of the prompt")
        axes.set_xticks(range(len(every)), names)
        axes.set(title=phase, ylabel="ms per layer")
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize="small", loc="upper left")
    machines = (values["machine"] for values in results.values())
    gpus = dict.fromkeys(machine.get("gpu", machine["cpu"]) for machine in machines)
    figure.suptitle(", ".join(gpus), fontsize="medium")
    return figure


def main() -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--results", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw(read_results(arguments.results)).savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    run(main)
