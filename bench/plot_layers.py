"""Milliseconds per layer: of decode steps by batch size, and of prompts by length.

A file of one number of layers has no slope; its steps are divided by their layers, head and
sampling included.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.hopper_decoder import prefill_flop, step_bytes
from bench.panels import Bar, Panel, Tick
from bench.synthetic_engine import DECODERS
from nvlm.checkpoint_config import CheckpointConfig

Point = tuple[int, int]
"""Batch size, context or prompt."""


def panels(values: dict[str, Any]) -> list[Panel]:
    found = []
    for phase in ("decode", "prefill"):
        measured = points(values, phase)
        if not measured:
            continue
        if phase == "decode":
            context = min(num_tokens for _, num_tokens in measured)
            xlabel = f"batch size, at {context:,} tokens of context"
        else:
            xlabel = "tokens of the prompt"
        bars: dict[Tick, Bar] = {}
        for point, ms in measured.items():
            number = point[0] if phase == "decode" else point[1]
            bars[number, f"{number:,}"] = Bar(ms, floor(values["ceilings"], phase, point))
        found.append(Panel(phase, xlabel, "ms per layer", "%.3f", bars))
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
