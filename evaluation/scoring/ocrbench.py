"""OCRBench: a point for each ground truth that stands in the answer, 1,000 in all.

As Megatron-LM counts; OCRBench's own program gives a sample one point at most.
"""

from __future__ import annotations

from evaluation.datasets.sample import SampleId
from evaluation.scoring.score import Line, SampleScore, TaskScore, Truth

_RECOGNITION = "Text Recognition"
_GROUP_OF_TYPE = {
    "Regular Text Recognition": _RECOGNITION,
    "Irregular Text Recognition": _RECOGNITION,
    "Artistic Text Recognition": _RECOGNITION,
    "Handwriting Recognition": _RECOGNITION,
    "Digit String Recognition": _RECOGNITION,
    "Non-Semantic Text Recognition": _RECOGNITION,
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition": "Handwritten Math Expressions",
}
TYPES = tuple(_GROUP_OF_TYPE)
_OFFICIAL = "at most one a sample"
FORMULAS, FORMULAS_TYPE = "HME100k", "Handwritten Mathematical Expression Recognition"
"""The data set of the formulas, and the type that holds them alone."""


def points(answer: str, truths: list[str], dataset_name: str) -> int:
    """Formulas are compared without whitespace, everything else in lower case."""

    def comparable(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if dataset_name == FORMULAS else text.lower()

    return sum(comparable(truth) in comparable(answer) for truth in truths)


def score_ocrbench(lines: dict[SampleId, Line], _: Truth) -> TaskScore:
    samples = {}
    details: dict[str, float] = dict.fromkeys(_GROUP_OF_TYPE.values(), 0.0)
    for sample_id, line in lines.items():
        truths = line["gt_answer"]
        truths = [truths] if isinstance(truths, str) else truths
        value = points(line["answer"], truths, line["dataset_name"])
        samples[sample_id] = SampleScore(value, line["answer"], truths)
        details[_GROUP_OF_TYPE[line["data_type"]]] += value
    details[_OFFICIAL] = sum(min(sample.value, 1.0) for sample in samples.values())
    return TaskScore(sum(sample.value for sample in samples.values()), samples, details)
