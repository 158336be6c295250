"""VideoMME: the first of the letters A to D in the answer (eval_your_results.py), by length."""

from __future__ import annotations

import re
from collections import defaultdict

from evaluation.datasets.sample import SampleId
from evaluation.scoring.score import Line, SampleScore, TaskScore, Truth, mean_percent

# What may announce the letter holds capitals itself. The reference's list misses two commas too.
_ANNOUNCEMENTS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)
_LETTER = re.compile("[ABCD]")


def letter_in(response: str) -> str:
    """ "" where there is none."""
    for announcement in _ANNOUNCEMENTS:
        response = response.replace(announcement, "")
    match = _LETTER.search(response)
    return match[0] if match else ""


def score_video_mme(lines: dict[SampleId, Line], _: Truth) -> TaskScore:
    samples = {}
    by_duration: dict[str, list[float]] = defaultdict(list)
    for sample_id, line in lines.items():
        (question,) = line["questions"]
        value = float(letter_in(question["response"]) == question["answer"])
        samples[sample_id] = SampleScore(value, question["response"], [question["answer"]])
        by_duration[str(line["duration_category"])].append(value)
    return TaskScore(
        mean_percent([sample.value for sample in samples.values()]),
        samples,
        {duration: mean_percent(values) for duration, values in sorted(by_duration.items())},
    )
