"""The scorers on cases checked by hand, on what the references' own programs give
(data/evaluation_goldens.json), and beside packages that have the same measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluation.scoring.captions import score_captions
from evaluation.scoring.mathvista import announced_number, score_mathvista, two_decimals
from evaluation.scoring.mmmu import DISCIPLINES, SUBJECTS, score_mmmu, subject_of
from evaluation.scoring.multiple_choice import chosen_letter, marked_answer
from evaluation.scoring.ocrbench import TYPES, points, score_ocrbench
from evaluation.scoring.open_answers import is_right
from evaluation.scoring.score import Truth
from evaluation.scoring.short_answers import (
    anls,
    anls_official,
    exact_match,
    exact_match_official,
    relaxed_accuracy,
    relaxed_accuracy_official,
    vqa_accuracy,
    vqa_accuracy_official,
)
from evaluation.scoring.video_mme import letter_in, score_video_mme
from evaluation.scoring.vqa_text import normalize
from tests.reference.cider import cider_d

GOLDENS: dict[str, list[Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "evaluation_goldens.json").read_text()
)
LETTERS = ["A", "B", "C", "D"]
NO_TRUTH = Truth()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A dog", "dog"),
        ("The  Red\tcar\n", "red car"),
        ("two dogs and an owl", "2 dogs and owl"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("youre", "you're"),
        ("shes", "shes"),
        ("x-ray", "x ray"),
        ("x - ray", "x ray"),
        ("1,000", "1000"),
        ("1,000-ish", "1000ish"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("-5", "5"),
        ("50%", "50%"),
        ("yes!", "yes"),
        ("A", ""),
    ],
)
def test_vqa_normalization_by_hand(text: str, normal: str) -> None:
    assert normalize(text) == normal


def test_vqa_normalization_is_that_of_the_benchmarks_program() -> None:
    assert [(text, normalize(text)) for text, _ in GOLDENS["vqa_normalization"]] == [
        (text, expected) for text, expected in GOLDENS["vqa_normalization"]
    ]


def test_three_people_make_a_vqa_answer_right() -> None:
    people = ["red", "Red.", "the red", "blue", "blue", *["grey"] * 5]
    assert vqa_accuracy("red", people) == 1.0
    assert vqa_accuracy("blue", people) == pytest.approx(2 / 3)
    assert vqa_accuracy("green", people) == 0.0
    # Leaving one of the three out leaves 2 / 3 in three of ten sets, 1 in the other seven.
    assert vqa_accuracy_official("red", people) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy_official("blue", people) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)


@pytest.mark.parametrize(
    ("answer", "truth", "reference", "official"),
    [
        ("105", "100", 1, 1),
        ("105.1", "100", 0, 0),
        ("95", "100", 1, 1),
        ("94.9", "100", 0, 0),
        ("52%", "50", 1, 0),
        ("50 %", "50%", 1, 1),
        ("0.5", "50%", 0, 1),
        ("-52", "-50", 1, 1),
        ("-52", "50", 1, 0),  # the reference's normalisation drops the sign
        ("1,000", "1000", 1, 0),
        ("Yes.", "yes", 1, 0),
        ("YES", "yes", 1, 1),
        ("the Netherlands", "Netherlands", 1, 0),
        ("0", "0", 1, 1),
        ("four", "4", 1, 0),
    ],
)
def test_chartqa_takes_numbers_within_five_percent(
    answer: str, truth: str, reference: float, official: float
) -> None:
    assert relaxed_accuracy(answer, [truth]) == reference
    assert relaxed_accuracy_official(answer, [truth]) == official


def test_chartqa_is_scored_as_the_reference_scores_it() -> None:
    for answer, truth, expected in GOLDENS["chartqa"]:
        assert relaxed_accuracy(answer, [truth]) == expected, (answer, truth)


@pytest.mark.parametrize(
    ("answer", "truths", "expected"),
    [
        ("marble", ["marbles"], 1 - 1 / 7),
        ("MARBLE", ["stone", "marble"], 1.0),
        ("abcd", ["abxy"], 0.0),  # half of it: not below the threshold
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("a", ["an"], 1.0),  # articles are nothing, and nothing equals nothing
        ("a", ["b"], 0.0),
        ("", ["marble"], 0.0),
        ("new   york", ["New York"], 1.0),
    ],
)
def test_anls_by_hand(answer: str, truths: list[str], expected: float) -> None:
    assert anls(answer, truths) == pytest.approx(expected)


def test_anls_is_that_of_the_reference_and_of_the_package() -> None:
    for answer, truths, expected in GOLDENS["anls"]:
        assert anls(answer, truths) == pytest.approx(expected), (answer, truths)
    package = pytest.importorskip("anls")
    pairs = [("marble", ["marbles", "stone"]), ("2019", ["2109"]), ("left", ["right"])]
    for answer, truths in pairs:
        assert anls(answer, truths) == pytest.approx(package.anls_score(answer, truths))


def test_exact_match_is_of_what_is_left_after_normalisation() -> None:
    assert exact_match("B.", ["b"]) == 1.0
    assert exact_match("C", ["B"]) == 0.0
    assert exact_match("B. cat", ["B"]) == 0.0
    assert exact_match("The", ["A"]) == 1.0, "as the reference: both are articles"
    assert exact_match("", ["A"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [("", "A", 0), ("the", "A", 0), (" a", "A", 1), ("B", "B", 1), ("B.", "B", 0)],
)
def test_a_match_as_it_is_written_takes_a_for_a_letter(
    answer: str, truth: str, right: float
) -> None:
    assert exact_match_official(answer, [truth]) == right


def test_anls_as_it_is_written_keeps_articles_and_marks() -> None:
    assert anls_official("the", ["A"]) == 0.0
    assert anls_official("$0.28", ["0.28", "$0.29"]) == pytest.approx(1 - 1 / 5)
    assert anls_official("New\n York", ["new york"]) == 1.0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D) because of it", "D"),
        ("C.", "C"),
        ("The answer is B", "B"),
        ("Not A but C", "C"),
        ("(A) is wrong, (D) is right", "D"),
        ("it must be the big red barn there", "B"),
        ("red barn", "A"),  # too few words for an option's text: the first option
        ("", "A"),
        ("\\boxed{D}", "D"),
        ("Answer:C", "C"),
    ],
)
def test_the_letter_of_an_answer_by_hand(response: str, letter: str) -> None:
    options = {"A": "a cat", "B": "big red barn", "C": "blue", "D": "none of them"}
    assert chosen_letter(marked_answer(response), LETTERS, options) == letter


def test_the_letter_of_an_answer_is_that_of_the_reference() -> None:
    for response, options, letter in GOLDENS["multiple_choice"]:
        assert chosen_letter(marked_answer(response), LETTERS, options) == letter, response


@pytest.mark.parametrize(
    ("response", "truth", "right"),
    [
        ("The answer is 3.14159", "3.14", True),
        ("about 1,000 people", "1000", True),
        ("x = 7", "7", True),
        ("so it is 36 watts.", "36", True),
        ("so it is 36 watts.", "36 watts", True),
        ("8", "7", False),
        ("a rabbit", "rabbit", True),
        ("habit", "a", False),  # a lone letter needs a space beside it
        ("-7", "7", False),
        ("392 N", ["391", "392"], True),
    ],
)
def test_open_answers_by_hand(response: str, truth: str | list[str], right: bool) -> None:
    assert is_right(response, truth) == right


def test_open_answers_are_judged_as_the_reference_judges_them() -> None:
    for response, truth, right in GOLDENS["open_answers"]:
        assert is_right(response, truth) == right, (response, truth)


def test_mmmu_counts_every_question_once_and_disciplines_apart() -> None:
    choice = {"question_type": "multiple-choice", "all_choices": ["A", "B"]}
    choice |= {"index2ans": {"A": "x", "B": "y"}}
    lines = {
        "validation_Art_1": {"prediction": "B", **choice},
        "validation_Art_Theory_2": {"prediction": "A", **choice},
        "validation_Music_3": {"prediction": "(B)", **choice},
        "validation_Physics_4": {"prediction": "It is 9.81", "question_type": "open"},
    }
    truth = {"validation_Art_1": "B", "validation_Art_Theory_2": "B", "validation_Music_3": "B"}
    answers = {key: {"ground_truth": letter} for key, letter in truth.items()}
    answers["validation_Physics_4"] = {"ground_truth": "9.81"}
    score = score_mmmu(dict(lines), Truth(answers))
    assert score.value == 75.0
    assert score.details == {"Art and Design": pytest.approx(200 / 3), "Science": 100.0}
    assert len(SUBJECTS) == 30
    assert sum(map(len, DISCIPLINES.values())) == 30
    assert subject_of("test_Architecture_and_Engineering_14") == "Architecture_and_Engineering"


@pytest.mark.parametrize(
    ("text", "cut"),
    [("12.999", "12.99"), ("2.00", "2"), ("0.5", "0.5"), ("36%", "36"), ("7.", "7"), ("", "")],
)
def test_mathvista_cuts_decimals(text: str, cut: str) -> None:
    assert two_decimals(text) == cut


def test_mathvista_free_form_is_read_as_the_reference_reads_it() -> None:
    for text, expected in GOLDENS["mathvista_free_form"]:
        assert announced_number(two_decimals(normalize(text))) == expected, text


def test_mathvista_scores_letters_and_free_answers() -> None:
    free = {"question_type": "free_form", "index2ans": {}, "all_choices": []}
    choice = {"question_type": "multi_choice", "all_choices": ["A", "B"]}
    choice |= {"index2ans": {"A": "1", "B": "2"}}
    score = score_mathvista(
        {
            "1": {"answer": "The answer is 1.509", "gt_answer": ["1.50"], **free},
            "2": {"answer": "1,200", "gt_answer": ["1200"], **free},
            "3": {"answer": "B. 2", "gt_answer": ["B"], **choice},
            "4": {"answer": "A", "gt_answer": ["B"], **choice},
        },
        NO_TRUTH,
    )
    # "answer is" is looked for after decimals are cut, and a sentence has none to cut.
    assert [sample.value for sample in score.samples.values()] == [0.0, 1.0, 0.0, 0.0]
    assert score.value == 25.0
    assert score.details == {"multi choice": 0.0, "free form": 50.0}


@pytest.mark.parametrize(
    ("answer", "truths", "dataset", "expected"),
    [
        ("The total is $12.50.", ["$12.50"], "SROIE", 1),
        ("RABBIT HOLE", ["rabbit\nhole"], "IIIT5K", 1),
        ("rabbit", ["hare"], "IIIT5K", 0),
        ("copper and tin", ["Copper", "TIN", "zinc"], "FUNSD", 2),
        ("x ^ 2 + Y", ["x^2+Y"], "HME100k", 1),
        ("x ^ 2 + y", ["x^2+Y"], "HME100k", 0),  # case counts in formulas
        ("x^2+Y", ["x ^ 2 +\nY"], "HME100k", 1),
        ("a b", ["ab"], "IIIT5K", 0),  # whitespace counts elsewhere
    ],
)
def test_ocrbench_points(answer: str, truths: list[str], dataset: str, expected: int) -> None:
    assert points(answer, truths, dataset) == expected


def test_ocrbench_adds_up_by_group() -> None:
    lines = {
        number: {
            "answer": "yes",
            "gt_answer": ["yes"],
            "dataset_name": "x",
            "data_type": data_type,
        }
        for number, data_type in enumerate(TYPES)
    }
    score = score_ocrbench(dict(lines), NO_TRUTH)
    assert score.value == 10
    assert score.details["Text Recognition"] == 6
    assert list(score.details.values()) == [6, 1, 1, 1, 1, 10]
    lines[0]["gt_answer"] = ["yes", "Yes", "y"]
    twice = score_ocrbench(dict(lines), NO_TRUTH)
    assert (twice.value, twice.details["at most one a sample"]) == (12, 10)


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("The answer is C. It is red", "C"),
        ("Both A and C", "B"),  # as the reference: the first capital of the four
        ("no idea", ""),
        ("", ""),
        ("(D) four", "D"),
    ],
)
def test_video_letters(response: str, letter: str) -> None:
    assert letter_in(response) == letter


def test_video_mme_by_duration() -> None:
    def line(duration: str, response: str, answer: str) -> dict[str, Any]:
        question = {"question_id": "1", "response": response, "answer": answer}
        return {"duration_category": duration, "questions": [question]}

    score = score_video_mme(
        {"1": line("short", "A", "A"), "2": line("short", "B", "A"), "3": line("long", "A.", "A")},
        NO_TRUTH,
    )
    assert score.value == pytest.approx(200 / 3)
    assert score.details == {"long": 100.0, "short": 50.0}


@pytest.mark.process
def test_cider_is_that_of_its_formulas() -> None:
    if shutil.which("java") is None:
        pytest.skip("no Java")
    pytest.importorskip("pycocoevalcap")
    captions = {7: "a man rides a brown horse.", 8: "Two dogs run on the beach", 9: "a red bus"}
    references = {
        7: ["a man is riding a horse", "a man rides a brown horse on grass"],
        8: ["two dogs play on the beach", "dogs run on sand near the sea"],
        9: ["a red bus on the street", "the bus is red"],
    }
    lines = {i: {"caption": captions[i], "ground_truth": references[i]} for i in captions}
    score = score_captions(dict(lines), NO_TRUTH)
    comparable = [text.rstrip(".").lower() for text in captions.values()]
    expected = cider_d(comparable, list(references.values()))
    assert [score.samples[i].value for i in captions] == pytest.approx(expected)
    assert score.value == pytest.approx(100 * sum(expected) / 3)
    assert score.value > 100, "most words are right"
