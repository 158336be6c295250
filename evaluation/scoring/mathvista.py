"""MathVista without a judge model (evaluate_mathvista.py)."""

from __future__ import annotations

import re

from evaluation.datasets.sample import SampleId
from evaluation.scoring.multiple_choice import chosen_letter
from evaluation.scoring.score import Line, SampleScore, TaskScore, Truth, mean_percent
from evaluation.scoring.vqa_text import normalize

_DECIMAL = re.compile(r"(\d+)\.(\d+)")
_ANNOUNCED = re.compile(r"answer is (-*\d+\.*\d*)")


def score_mathvista(lines: dict[SampleId, Line], _: Truth) -> TaskScore:
    samples = {}
    groups: dict[str, list[float]] = {"multi_choice": [], "free_form": []}
    for sample_id, line in lines.items():
        (truth,) = line["gt_answer"]
        if line["question_type"] == "multi_choice":
            answer = chosen_letter(line["answer"], line["all_choices"], line["index2ans"])
            value = float(answer == truth)
        else:
            value = float(
                announced_number(two_decimals(normalize(line["answer"])))
                == two_decimals(normalize(truth))
            )
        samples[sample_id] = SampleScore(value, line["answer"], line["gt_answer"])
        groups[line["question_type"]].append(value)
    return TaskScore(
        mean_percent([sample.value for sample in samples.values()]),
        samples,
        {name.replace("_", " "): mean_percent(values) for name, values in groups.items() if values},
    )


def two_decimals(text: str) -> str:
    """Cuts decimals after the second; zeros alone go, and so do % and a last period."""
    if match := _DECIMAL.fullmatch(text):
        whole, decimals = match.groups()
        text = f"{whole}.{decimals[:2]}" if int(decimals) else whole
    return text.replace("%", "").removesuffix(".")


def announced_number(text: str) -> str:
    """The number after "answer is", if a sentence says so."""
    if "e+" not in text and (match := _ANNOUNCED.search(text)):
        return match[1]
    return text
