"""MMMU: accuracy over all questions, by discipline and subject (main_eval_only.py)."""

from __future__ import annotations

from collections import defaultdict

from evaluation.datasets.sample import SampleId
from evaluation.scoring.multiple_choice import chosen_letter, marked_answer
from evaluation.scoring.open_answers import is_right
from evaluation.scoring.score import Line, SampleScore, TaskScore, Truth, mean_percent

HIDDEN = "?"
"""The ground truth of the test split."""

DISCIPLINES: dict[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(sorted(subject for group in DISCIPLINES.values() for subject in group))


def subject_of(sample_id: str) -> str:
    """validation_Art_Theory_3 -> Art_Theory."""
    return "_".join(sample_id.split("_")[1:-1])


def parsed_prediction(line: Line) -> str:
    """A letter for multiple choice; an open answer as it is."""
    prediction: str = line["prediction"]
    if line["question_type"] != "multiple-choice":
        return prediction
    return chosen_letter(marked_answer(prediction), line["all_choices"], line["index2ans"])


def score_mmmu(lines: dict[SampleId, Line], truth: Truth) -> TaskScore:
    samples = {}
    by_subject: dict[str, list[float]] = defaultdict(list)
    for sample_id, line in lines.items():
        expected = truth.answers[str(sample_id)]["ground_truth"]
        truths = [expected] if isinstance(expected, str) else expected
        parsed = parsed_prediction(line)
        if line["question_type"] == "multiple-choice":
            value = float(parsed in truths)
        else:
            value = float(is_right(parsed, truths))
        samples[sample_id] = SampleScore(value, line["prediction"], truths)
        by_subject[subject_of(str(sample_id))].append(value)
    details = {}
    for discipline, subjects in DISCIPLINES.items():
        if values := [value for subject in subjects for value in by_subject.get(subject, [])]:
            details[discipline] = mean_percent(values)
    return TaskScore(mean_percent([sample.value for sample in samples.values()]), samples, details)
