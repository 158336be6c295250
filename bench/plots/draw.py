"""Draws what bench.hopper and its peers measured, for docs/, beside each file's own ceilings.

python -m bench.plots.draw layers --results us=h100.json transformers=peers.json --output FILE.svg
python -m bench.plots.draw vision --results us=vision.json --output FILE.svg
python -m bench.plots.draw model --results one=h200.json two=ranks.json --output FILE.svg
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.plots import layers, model, vision
from bench.plots.panels import Panel, draw
from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError

PLOTS: dict[str, Callable[[dict[str, Any]], list[Panel]]] = {
    "layers": layers.panels,
    "vision": vision.panels,
    "model": model.panels,
}


def plotted(plot: str, named: list[str]) -> Figure:
    """named: `name=file` each. Raises `UserError` for what holds nothing to plot."""
    results, devices = {}, []
    for text in named:
        name, _, path = text.partition("=")
        try:
            lines = Path(path).read_text().strip()
            values = json.loads(lines if lines.startswith("{") else lines.splitlines()[-1])
            results[name] = PLOTS[plot](values)
            devices.append(values["machine"].get("gpu") or values["machine"]["cpu"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            results[name] = []
        if not results[name]:
            raise UserError(
                f"{text!r} names no results for {plot!r}; give name=file with the output of "
                "bench.hopper"
            )
    figure = draw(results)
    figure.suptitle(", ".join(dict.fromkeys(devices)), fontsize="medium")
    return figure


def main() -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("plot", choices=PLOTS)
    parser.add_argument("--results", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    figure = plotted(arguments.plot, arguments.results)
    try:
        figure.savefig(arguments.output, metadata={"Date": None})
    except (OSError, ValueError) as error:  # a missing folder; a name whose end says no format
        raise UserError(
            f"{arguments.output} cannot be written ({error}); give an --output like plot.svg in a "
            "folder that exists"
        ) from error


if __name__ == "__main__":
    run(main)
