"""Draws the training curve of the small model's card from the log lines of its runs, in turn.

python -m tools.tiny.curve --logs run1.jsonl run2.jsonl --output curve.svg
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError

matplotlib.rcParams["svg.hashsalt"] = "nvlm"  # the same logs give the same bytes

TASKS = ("number", "word", "two_lines", "colour", "which_tile", "tile_shows", "count")
LOSSES = ("answer", "patch", "token")


def read_runs(logs: list[Path]) -> list[list[dict[str, Any]]]:
    """Raises `UserError` for a file that is no log of a run."""
    return [_read_run(log) for log in logs]


def _read_run(log: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        if lines and all(isinstance(line["step"], int) for line in lines):
            return lines
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{log} is no log of tools.tiny.train; give its log.jsonl")


def draw(runs: list[list[dict[str, Any]]]) -> Figure:
    """Losses above, right answers on the validation fonts below, over the steps of all runs."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    losses, scores = figure.subplots(2, 1, sharex=True)
    curves: dict[str, tuple[list[float], list[float]]] = {
        name: ([], []) for name in (*LOSSES, *TASKS)
    }
    first_step = 0
    for lines in runs:
        for line in lines:
            for name, value in {**line, **line.get("validation", {})}.items():
                if name in curves:
                    curves[name][0].append(first_step + line["step"])
                    curves[name][1].append(value)
        first_step += lines[-1]["step"]
        for axes in (losses, scores):
            axes.axvline(first_step, color="grey", linewidth=0.8, linestyle=":")
    for axes, names in ((losses, LOSSES), (scores, TASKS)):
        for name in names:
            axes.plot(*curves[name], label=name, marker="." if name in TASKS else None)
        axes.legend(ncols=len(names) // 2 + 1, fontsize="small")
        axes.grid(alpha=0.3)
    losses.set(yscale="log", ylabel="loss, nats")
    scores.set(
        ylim=(0, 1.02), xlabel="training step", ylabel="share of right answers, validation fonts"
    )
    return figure


def main() -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--logs", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw(read_runs(arguments.logs)).savefig(arguments.output, metadata={"Date": None})


if __name__ == "__main__":
    run(main)
