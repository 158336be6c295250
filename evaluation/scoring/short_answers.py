"""TextVQA, VQAv2, ChartQA, AI2D, RealworldQA, SPDocVQA and InfoVQA (evaluate_vqav2.py), and
questions of one's own."""

from __future__ import annotations

from collections.abc import Callable

from evaluation.datasets.sample import SampleId
from evaluation.packages import require_package
from evaluation.scoring.score import Line, SampleScore, TaskScore, Truth, mean_percent
from evaluation.scoring.vqa_text import normalize

ANLS_THRESHOLD = 0.5

Compare = Callable[[str, list[str]], float]
"""(prediction, ground truths), both as they were written -> 0 to 1."""


def vqa_accuracy(prediction: str, truths: list[str]) -> float:
    """Three people who said it make it right."""
    answer = normalize(prediction)
    return min(1.0, sum(normalize(truth) == answer for truth in truths) / 3)


def vqa_accuracy_official(prediction: str, truths: list[str]) -> float:
    """VQA's own: the mean over all sets that leave one person out."""
    answer = normalize(prediction)
    matches = [normalize(truth) == answer for truth in truths]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def relaxed_accuracy(prediction: str, truths: list[str]) -> float:
    """ChartQA: numbers within 5 %, other answers exactly.

    As the reference: a trailing % is dropped, and so is a minus sign, by the normalisation.
    """
    answer, truth = (normalize(text).rstrip("%") for text in (prediction, *truths))
    number, expected = _number(answer), _number(truth)
    if number is None or expected is None:
        return float(answer == truth)
    return float(expected * 0.95 <= number <= expected * 1.05)


def relaxed_accuracy_official(prediction: str, truths: list[str]) -> float:
    """ChartQA's own (vis-nlp/ChartQA): percent is a hundredth, signs count, case does not."""
    answer, truth = (text.strip() for text in (prediction, *truths))
    number, expected = _number_or_percent(answer), _number_or_percent(truth)
    if number is None or not expected:
        return float(answer.lower() == truth.lower())
    return float(abs(number - expected) / abs(expected) <= 0.05)


def exact_match(prediction: str, truths: list[str]) -> float:
    (truth,) = truths
    return float(normalize(prediction) == normalize(truth))


def exact_match_official(prediction: str, truths: list[str]) -> float:
    """Compares what is written, in either case: "A" is a letter here, and no article."""
    (truth,) = truths
    return float(prediction.strip().lower() == truth.strip().lower())


def equal_to_one(prediction: str, truths: list[str]) -> float:
    """One of the answers, in either case and with any white space; nothing else is normalised."""
    return float(_in_one_case(prediction) in map(_in_one_case, truths))


def holds_one(prediction: str, truths: list[str]) -> float:
    """One of the answers stands in it, in either case."""
    answer = _in_one_case(prediction)
    return float(any(_in_one_case(truth) in answer for truth in truths))


def _in_one_case(text: str) -> str:
    return " ".join(text.casefold().split())


def anls(prediction: str, truths: list[str]) -> float:
    """As the reference: of what VQA's normalisation leaves, which drops articles and marks."""
    return anls_official(normalize(prediction), [normalize(truth) for truth in truths])


def anls_official(prediction: str, truths: list[str]) -> float:
    """Average Normalized Levenshtein Similarity of one answer (Biten et al., arXiv 1905.13648):
    1 - distance / longer length for the closest truth, 0 from half the length on. In lower case,
    runs of whitespace are one space."""
    distance = require_package(
        "rapidfuzz.distance.Levenshtein", "rapidfuzz", "ANLS (SPDocVQA, InfoVQA)"
    ).normalized_distance
    answer, *expected = (" ".join(text.lower().split()) for text in (prediction, *truths))
    distances = [float(distance(answer, truth)) for truth in expected]
    return max(1.0 - d if d < ANLS_THRESHOLD else 0.0 for d in distances)


def score_by(
    compare: Compare, **official: Compare
) -> Callable[[dict[SampleId, Line], Truth], TaskScore]:
    """A scorer of lines with `answer` and `gt_answer`; `official` compares otherwise, by name."""

    def score(lines: dict[SampleId, Line], _: Truth) -> TaskScore:
        samples = {
            sample_id: SampleScore(
                compare(line["answer"], line["gt_answer"]), line["answer"], line["gt_answer"]
            )
            for sample_id, line in lines.items()
        }
        details = {
            name.replace("_", " "): mean_percent(
                [other(line["answer"], line["gt_answer"]) for line in lines.values()]
            )
            for name, other in official.items()
        }
        return TaskScore(
            mean_percent([sample.value for sample in samples.values()]), samples, details
        )

    return score


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _number_or_percent(text: str) -> float | None:
    number = _number(text.rstrip("%"))
    return number / 100 if number is not None and text.endswith("%") else number
