"""Answers that say nothing: how many there are, and how many the reference's rules call right.

Its normalisation drops articles, so nothing and "the" equal the option "A" (AI2D, ANLS); MMMU's
rule takes the first option where an answer names none.
"""

from __future__ import annotations

from evaluation.scoring.score import SampleScore, TaskScore
from evaluation.scoring.vqa_text import normalize


def told_of_empty_answers(score: TaskScore) -> str | None:
    """One sentence, or None where every answer says something."""
    samples = score.samples.values()
    num_empty = sum(not sample.answer.strip() for sample in samples)
    num_right = sum(sample.value > 0 and _says_nothing(sample) for sample in samples)
    if not num_empty and not num_right:
        return None
    told = f"Empty answers: {num_empty:,} of {len(samples):,}"
    if not num_right:
        return told
    return f"{told}; right by the reference's rules though they say nothing: {num_right:,}"


def _says_nothing(sample: SampleScore) -> bool:
    """Nothing is left but articles, and the truth is another word."""
    answer = _essence(sample.answer)
    return not normalize(sample.answer) and answer not in map(_essence, sample.truth)


def _essence(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
