"""The whole model: a step's milliseconds by batch size, prompts, the first token of a request with
seven tiles, and throughput. Of a file with several numbers of layers, the largest."""

from __future__ import annotations

from typing import Any

from bench.plots.panels import Bar, Panel

PROMPTS = {"prefill": "after a pause", "prefill, busy": "busy", "prefill, new": "of new lengths"}
FIRST = {"first, FP8": "FP8", "first, bfloat16": "bfloat16"}


def panels(values: dict[str, Any]) -> list[Panel]:
    """The phases that the file has rows for: a file of ranks may have decode and prefill only."""
    phases = ("decode", *PROMPTS, *FIRST, "serving")
    rows = [row for row in values["rows"] if row["phase"] in phases]
    num_layers = max((row["num_layers"] for row in rows), default=0)
    rows = [row for row in rows if row["num_layers"] == num_layers]
    found = (_decode(rows), _prefill(rows), _first_token(rows), _serving(rows))
    return [panel for panel in found if panel.bars]


def _decode(rows: list[dict[str, Any]]) -> Panel:
    steps = [row for row in rows if row["phase"] == "decode"]
    bars = {(row["batch_size"], f"{row['batch_size']}"): Bar.of_row(row) for row in steps}
    context = min((row["num_tokens"] for row in steps), default=0)
    xlabel = f"batch size, at {context:,} tokens of context"
    return Panel("decode", xlabel, "ms a token", "%.1f", bars)


def _prefill(rows: list[dict[str, Any]]) -> Panel:
    order = list(PROMPTS)
    bars = {
        (
            len(order) * row["num_tokens"] + order.index(row["phase"]),
            f"{row['num_tokens']:,},\n{PROMPTS[row['phase']]}",
        ): Bar.of_row(row)
        for row in rows
        if row["phase"] in PROMPTS
    }
    return Panel("prefill", "tokens of the prompt", "ms", "%.0f", bars)


def _first_token(rows: list[dict[str, Any]]) -> Panel:
    order = list(FIRST)
    bars = {
        (order.index(row["phase"]), FIRST[row["phase"]]): Bar.of_row(row)
        for row in rows
        if row["phase"] in FIRST
    }
    xlabel = "precision of vision; ceiling: FP8 for both"  # as the rows' shares
    return Panel("first token, seven tiles", xlabel, "ms", "%.0f", bars)


def _serving(rows: list[dict[str, Any]]) -> Panel:
    bars = {
        (row["batch_size"], f"{row['batch_size']}"): Bar(
            row["tokens_per_s"], row["tokens_per_s"] / row["share"]
        )
        for row in rows
        if row["phase"] == "serving"
    }
    num_tokens = min((row["num_tokens"] for row in rows if row["phase"] == "serving"), default=0)
    xlabel = f"requests at a time, of {num_tokens:,} tokens each"
    return Panel("serving", xlabel, "tokens/s out", "%.0f", bars)
