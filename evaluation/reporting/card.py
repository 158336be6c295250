"""The model card's numbers beside ours: its table, and what each number is of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.reporting.results import Results
from evaluation.tasks import TASKS

_NONE = "-"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of scores, the card's rows last."""

    columns: list[str]  # their names
    rows: list[list[str]]  # a cell for each column, the first of which names the row
    num_published: int  # how many rows are the card's
    source: str  # where the card's numbers are from


def card_table(runs: Sequence[tuple[str, Mapping[str, float]]]) -> Table:
    """runs: (name, task -> score) of each. Tasks that are not on the card get columns after its."""
    card = _card()
    in_card = [task for _, task, _ in card["columns"]]
    others = [t for t in TASKS if t not in in_card and any(t in scores for _, scores in runs)]
    ours = [
        [name, *(_cell(task, scores.get(task)) for task in in_card + others)]
        for name, scores in runs
    ]
    published = [row + [_NONE] * len(others) for row in card["rows"]]
    columns = ["benchmark", *(title for title, _, _ in card["columns"]), *others]
    return Table(columns, ours + published, len(published), card["source"])


def scope(results: Results) -> str:
    """Say what a score is of, as: 8 samples of val_v1.0_withQT.json (card: test)."""
    split = _split(results.task.name)
    card = f" (card: {split})" if split else ""
    number = len(results.lines)
    return f"{number:,} sample{'s' if number != 1 else ''} of {_data(results)}{card}"


def _split(task: str) -> str | None:
    """Name the split that the card's number is of; None where it has none."""
    return {name: split for _, name, split in _card()["columns"]}.get(task)


def _data(results: Results) -> str:
    if not results.records:
        return "unknown data"
    location = results.records[0].location
    names = " + ".join(path.name for path in location.gt_paths)
    return names or f"split {location.split or results.task.default_split}"


def _card() -> Any:
    return json.loads(Path(__file__).with_name("card.json").read_text(encoding="utf-8"))


def _cell(task: str, value: float | None) -> str:
    if value is None:
        return _NONE
    if TASKS[task].unit == "points":
        return f"{value:.0f}"
    # Only the validation split of MMMU is scored here; the server scores the other.
    return f"{value:.1f} / {_NONE}" if task == "MMMU" else f"{value:.1f}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
