"""What a score is of: how many samples of which file, beside what the card's number is of."""

from __future__ import annotations

from evaluation.reporting.card import card_split
from evaluation.reporting.results import Results


def scope(results: Results) -> str:
    """8 samples of val_v1.0_withQT.json (card: test)."""
    split = card_split(results.task.name)
    card = f" (card: {split})" if split else ""
    number = len(results.lines)
    return f"{number:,} sample{'s' if number != 1 else ''} of {_data(results)}{card}"


def _data(results: Results) -> str:
    if not results.records:
        return "unknown data"
    location = results.records[0].location
    names = " + ".join(path.name for path in location.gt_paths)
    return names or f"split {location.split or results.task.default_split}"
