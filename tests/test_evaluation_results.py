"""evaluate.py on files of answers: merging, submissions, comparison, the report as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.card import card_table
from evaluation.compare import compare
from evaluation.output_paths import record_path
from evaluation.scoring.score import SampleScore, TaskScore
from tests.benchmarks import run_record, short, write_answers
from tests.command import EVALUATE, run_command


def evaluated(*flags: object) -> dict[str, Any]:
    result = run_command(EVALUATE, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_partitions_merge_and_the_first_answer_to_a_sample_counts(tmp_path: Path) -> None:
    """As Megatron-LM's own files: several ranks and partitions, some samples twice."""
    prefix = tmp_path / "run"
    write_answers(prefix, "ChartQA", [short(0, "10", "10"), short(1, "20", "50")])
    write_answers(prefix, "ChartQA", [short(1, "50", "50"), short(2, "Yes", "yes")], partition=1)
    path = Path(f"{prefix}-ChartQA-dprank=1-partition=1-step=5.jsonl")
    path.write_text(json.dumps(short(3, "no", "yes")) + "\n")
    report = evaluated("--task", "chartqa", "--input_path", prefix)["tasks"]["ChartQA"]
    assert (report["score"], report["num_samples"], report["num_duplicates"]) == (50.0, 4, 1)
    merged = json.loads((tmp_path / "run-ChartQA-merged.json").read_text())
    assert [line["question_id"] for line in merged] == [0, 1, 2, 3]
    assert merged[1]["answer"] == "20"


def test_a_single_file_can_be_scored(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "run", "AI2D", [short("a", "B", "B"), short("b", "C", "B")])
    report = evaluated("--task", "AI2D", "--input_path", path)["tasks"]["AI2D"]
    assert report["score"] == 50.0
    merged = json.loads((tmp_path / (path.stem + "-merged.json")).read_text())
    assert merged[0] == {"question_id": "a", "answer": "B", "gt_answer": ["B"]}


def test_a_prefix_with_characters_of_patterns_is_taken_as_it_is(tmp_path: Path) -> None:
    prefix = tmp_path / "fp8[1]*"
    write_answers(prefix, "AI2D", [short("a", "B", "B")])
    assert evaluated("--input_path", prefix)["tasks"]["AI2D"]["score"] == 100.0


@pytest.mark.parametrize(
    ("task", "submission"),
    [
        ("VQAv2", [{"question_id": 262144000, "answer": "yes"}]),
        ("TextVQA", [{"question_id": 262144000, "answer": "yes"}]),
        ("SPDocVQA", [{"questionId": 262144000, "answer": "yes"}]),
        ("InfoVQA", [{"questionId": 262144000, "answer": "yes"}]),
    ],
)
def test_hidden_answers_give_what_the_server_takes(
    task: str, submission: Any, tmp_path: Path
) -> None:
    write_answers(tmp_path / "run", task, [short(262144000, "yes", "")])
    report = evaluated("--task", task, "--input_path", tmp_path / "run")["tasks"][task]
    assert report["score"] is None
    assert json.loads(Path(report["submission"]).read_text()) == submission
    assert not (tmp_path / f"run-{task}-merged.json").exists()


def mmmu_lines(split: str) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{split}_Art_1",
            "prompt": "",
            "text": "(B)",
            "prediction": "(B)",
            "question_type": "multiple-choice",
            "index2ans": {"A": "x", "B": "y"},
            "all_choices": ["A", "B"],
        },
        {
            "sample_id": f"{split}_Math_2",
            "prompt": "",
            "text": "12.5",
            "prediction": "12.5",
            "question_type": "open",
        },
    ]


def test_mmmu_test_gives_a_submission_and_validation_a_score(tmp_path: Path) -> None:
    for split, truths in (("test", ("?", "?")), ("validation", ("A", "12.50"))):
        write_answers(tmp_path / split, "MMMU", list(mmmu_lines(split)))
        gt = tmp_path / f"{split}.json"
        answers = {
            line["sample_id"]: {"question_type": "", "ground_truth": truth}
            for line, truth in zip(mmmu_lines(split), truths, strict=True)
        }
        gt.write_text(json.dumps(answers))
    flags = ("--task", "MMMU", "--input_path")
    hidden = evaluated(*flags, tmp_path / "test", "--gt_path", tmp_path / "test.json")
    path = Path(hidden["tasks"]["MMMU"]["submission"])
    assert json.loads(path.read_text()) == {"test_Art_1": "B", "test_Math_2": "12.5"}
    gt = tmp_path / "validation.json"
    public = evaluated(*flags, tmp_path / "validation", "--gt_path", gt)
    assert public["tasks"]["MMMU"]["score"] == 50.0


def test_a_comparison_tells_what_changed_and_whether_it_is_chance(tmp_path: Path) -> None:
    """Of 100 samples eight become wrong and one right: McNemar's exact p is 2 (1 + 9) / 2^9."""
    ours = [short(i, "x" if i < 8 or i >= 60 else "yes", "yes") for i in range(100)]
    theirs = [short(i, "yes" if 1 <= i < 60 or i == 0 else "y", "yes") for i in range(100)]
    ours[70] = short(70, "yes", "yes")
    write_answers(tmp_path / "fp8", "RealworldQA", list(ours))
    write_answers(tmp_path / "bf16", "RealworldQA", list(theirs))
    flags = ("--input_path", tmp_path / "fp8", "--compare", tmp_path / "bf16")
    found = evaluated(*flags)["tasks"]["RealworldQA"]["comparison"]
    assert (found["score"], found["other_score"]) == (53.0, 60.0)
    assert (found["num_better"], found["num_worse"], found["num_paired"]) == (1, 8, 100)
    assert found["p_value"] == pytest.approx(20 / 512)
    assert found["difference"] == pytest.approx(-7.0)
    low, high = found["interval"]
    assert low < -7.0 < high < 0.0, "p is below 0.05"
    text = run_command(EVALUATE, *flags).stdout
    assert "53.00 against 60.00 over 100 samples: -7.00" in text
    assert "chance alone would hardly do this" in text


def test_a_comparison_says_when_not_the_engines_alone_differ(tmp_path: Path) -> None:
    for name, engine, max_new_tokens in (("a", "1", 128), ("b", "2", 128), ("c", "2", 16)):
        path = write_answers(tmp_path / name, "AI2D", [short(1, "A", "A")])
        run_record("AI2D", engine=engine, max_new_tokens=max_new_tokens).write(record_path(path))
    flags = ("--input_path", tmp_path / "a", "--report_dir", tmp_path / "report", "--compare")
    result = run_command(EVALUATE, *flags, tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert "engines alone" not in result.stdout
    told = "Not the engines alone differ: max_new_tokens 128 against 16."
    assert told in run_command(EVALUATE, *flags, tmp_path / "c").stdout
    assert told in (tmp_path / "report" / "report.html").read_text()


def test_points_add_up_in_a_comparison() -> None:
    def score(values: list[float]) -> TaskScore:
        samples = {i: SampleScore(value, str(value), []) for i, value in enumerate(values)}
        return TaskScore(sum(values), dict(samples))

    found = compare(score([2, 1, 0]), score([1, 1, 1]), "points")
    assert (found.value, found.other_value, found.difference) == (3, 3, 0)
    assert [change.id for change in found.changes] == [2, 0], "the losses first"


def test_the_table_has_the_cards_rows_below_ours() -> None:
    table = card_table([("fp8", {"OCRBench": 850.0, "MMMU": 59.94, "captioning": 120.55})])
    assert table.columns == [
        *("benchmark", "MMMU val / test", "MathVista", "OCRBench", "AI2D", "ChartQA", "DocVQA"),
        *("TextVQA", "RealWorldQA", "VQAv2", "captioning"),
    ]
    assert table.rows[0] == ["fp8", "59.9 / -", "-", "850", *["-"] * 6, "120.5"]
    assert table.rows[1] == [
        *("NVLM-D 1.0 72B (Megatron-Core)", "59.9 / 54.1", "67.4", "851", "94.4", "86.9"),
        *("92.1", "81.2", "66.8", "85.4", "-"),
    ]
    assert table.num_published == 6
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_the_report_is_written_beside_the_markdown_on_stdout(tmp_path: Path) -> None:
    write_answers(tmp_path / "run", "TextVQA", [short(1, "a | b", "a | b")])
    flags = ("--input_path", tmp_path / "run", "--report_dir", tmp_path / "report")
    result = run_command(EVALUATE, *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("# Evaluation\n")
    assert (tmp_path / "report" / "report.md").read_text().strip() == result.stdout.strip()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
