"""What a reader of a task's score must know: sentences for the report."""

from __future__ import annotations

from evaluation.reporting.empty_answers import told_of_empty_answers
from evaluation.reporting.what_differs import what_differs
from evaluation.scoring.scored import Scored


def notes_on(scored: Scored, other: Scored | None, not_compared: str | None) -> list[str]:
    """`other`: what it is compared with; `not_compared`: why it could not be."""
    notes = list(scored.notes)
    if scored.score and (empty := told_of_empty_answers(scored.score)):
        notes.append(f"{empty}.")
    if number := scored.results.num_duplicates:
        notes.append(f"Left out, answers to samples that had one already: {number:,}.")
    if not_compared:
        notes.append(f"Not compared: {not_compared}.")
    elif other and (unlike := what_differs(scored, other)):
        notes.append(f"Not the engines alone differ: {'; '.join(unlike)}.")
    return notes
