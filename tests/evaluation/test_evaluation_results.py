"""evaluate.py on files of answers: merging, submissions, comparison, the report as text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.asking.output_paths import record_path
from evaluation.reporting.card import card_table
from evaluation.reporting.compare import compare
from evaluation.scoring.score import SampleScore, TaskScore
from tests.support.benchmarks import run_record, short, write_answers
from tests.support.command import SCORE, one_line_error, run_command


def evaluated(*flags: object) -> dict[str, Any]:
    result = run_command(*SCORE, *flags, "--json")
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


def test_a_comparison_says_what_changed_and_whether_it_is_chance(tmp_path: Path) -> None:
    """Eight of 100 samples become wrong and one right: McNemar's exact p is 2 (1 + 9) / 2^9."""
    ours = [short(i, "x" if i < 8 or i >= 60 else "yes", "yes") for i in range(100)]
    theirs = [short(i, "yes" if 1 <= i < 60 or i == 0 else "y", "yes") for i in range(100)]
    ours[70] = short(70, "yes", "yes")
    write_answers(tmp_path / "fp8", "RealworldQA", list(ours))
    write_answers(tmp_path / "bf16", "RealworldQA", list(theirs))
    flags = ("--input_path", tmp_path / "fp8", "--compare", tmp_path / "bf16")
    (found,) = evaluated(*flags)["tasks"]["RealworldQA"]["comparisons"]
    assert (found["score"], found["other_score"]) == (53.0, 60.0)
    assert (found["num_better"], found["num_worse"], found["num_paired"]) == (1, 8, 100)
    assert found["p_value"] == pytest.approx(20 / 512)
    assert found["difference"] == pytest.approx(-7.0)
    low, high = found["interval"]
    assert low < -7.0 < high < 0.0, "p is below 0.05"
    text = run_command(*SCORE, *flags).stdout
    assert "53.00 against 60.00 over 100 samples: -7.00" in text
    assert "chance alone would hardly do this" in text


def test_a_comparison_says_when_not_the_engines_alone_differ(tmp_path: Path) -> None:
    for name, engine, max_new_tokens in (("a", "1", 128), ("b", "2", 128), ("c", "2", 16)):
        path = write_answers(tmp_path / name, "AI2D", [short(1, "A", "A")])
        run_record("AI2D", engine=engine, max_new_tokens=max_new_tokens).write(record_path(path))
    flags = ("--input_path", tmp_path / "a", "--report_dir", tmp_path / "report", "--compare")
    result = run_command(*SCORE, *flags, tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert "engines alone" not in result.stdout
    message = "Not the engines alone differ: max_new_tokens 128 against 16."
    assert message in run_command(*SCORE, *flags, tmp_path / "c").stdout
    assert message in (tmp_path / "report" / "report.html").read_text()


def test_several_runs_stand_on_one_page_each_with_its_own_test(tmp_path: Path) -> None:
    """As BF16, FP8 with a BF16 cache, FP8 with an FP8 cache; the middle one has a task less."""
    answers = {"fp8": "BBCB", "fp8_bf16_kv": "BBBB", "bf16": "ABBB"}
    for name, letters in answers.items():
        lines = [short(i, letter, "B") for i, letter in enumerate(letters)]
        path = write_answers(tmp_path / name, "AI2D", lines)
        run_record("AI2D", engine=name).write(record_path(path))
        if name != "fp8_bf16_kv":
            write_answers(tmp_path / name, "ChartQA", [short(1, "5", "5")])
    others = (tmp_path / "fp8_bf16_kv", tmp_path / "bf16")
    start = ("--input_path", tmp_path / "fp8", "--report_dir", tmp_path / "report", "--compare")
    result = run_command(*SCORE, *start, *others, "--json")
    assert result.exit_code == 2
    assert f"ChartQA is not compared: --compare {others[0]}" in result.stderr
    values = json.loads(result.stdout)
    middle, last = values["other_names"]
    assert (middle.split()[0], last.split()[0]) == ("fp8_bf16_kv", "bf16")
    found = values["tasks"]["AI2D"]["comparisons"]
    assert [row["other_name"] for row in found] == [middle, last]
    assert [(row["score"], row["other_score"]) for row in found] == [(75.0, 100.0), (75.0, 75.0)]
    assert [row["changed"] for row in found] == [[2], [2, 0]]
    assert [row["other_name"] for row in values["tasks"]["ChartQA"]["comparisons"]] == [last]
    text = (tmp_path / "report" / "report.md").read_text()
    assert f"Against {middle}: 75.00 against 100.00" in text
    assert f"Against {last}: 75.00 against 75.00" in text
    assert (
        text.index(f"| {values['name']} |")
        < text.index(f"| {middle} |")
        < text.index(f"| {last} |")
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<svg class") == 3
    assert f"beside {middle}, {last}" in page
    twice = run_command(*SCORE, *start, others[1], others[1])
    one_line_error(twice, "--compare", "twice", "give it once")


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
    result = run_command(*SCORE, *flags)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("# Evaluation\n")
    assert (tmp_path / "report" / "report.md").read_text().strip() == result.stdout.strip()
    page = (tmp_path / "report" / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page


def test_a_task_that_the_other_run_does_not_have_keeps_its_score(tmp_path: Path) -> None:
    write_answers(tmp_path / "fp8", "ChartQA", [short(1, "5", "5")])
    write_answers(tmp_path / "fp8", "AI2D", [short(1, "B", "B")])
    write_answers(tmp_path / "bf16", "ChartQA", [short(1, "5", "5")])
    write_answers(tmp_path / "other", "AI2D", [short(2, "B", "B")])
    flags = ("--input_path", tmp_path / "fp8", "--json", "--compare")
    result = run_command(*SCORE, *flags, tmp_path / "bf16")
    assert result.exit_code == 2
    assert "error: AI2D is not compared: --compare" in result.stderr
    tasks = json.loads(result.stdout)["tasks"]
    assert [tasks[name]["score"] for name in ("AI2D", "ChartQA")] == [100.0, 100.0]
    assert [len(tasks[name]["comparisons"]) for name in ("AI2D", "ChartQA")] == [0, 1]
    alone = run_command(*SCORE, "--task", "AI2D", *flags, tmp_path / "other")
    assert alone.exit_code == 2
    assert "AI2D is not compared: the two runs have no sample in common" in alone.stderr
    assert json.loads(alone.stdout)["tasks"]["AI2D"]["score"] == 100.0


@pytest.mark.parametrize("what", ["image", "folder", "question", "truth", "split"])
def test_a_comparison_says_when_it_is_not_of_the_same_samples(what: str, tmp_path: Path) -> None:
    """The names of the files are the same. Questions and truths are seen without a record too."""
    for name in ("a", "b"):
        is_other = name == "b"
        lines = [short(i, "A", "B" if is_other and what == "truth" else "A") for i in (1, 2)]
        if is_other and what == "question":
            lines[1]["prompt"] = "<|im_start|>user\nWhy?<|im_end|>"
        path = write_answers(tmp_path / name, "AI2D", lines)
        record = replace(run_record("AI2D"), image_bytes={"1": 10, "2": 10}, num_samples=2)
        if is_other and what == "image":
            record.image_bytes["2"] = 11
        if what == "folder":
            record = replace(record, image_bytes={})
            record.data["input_image_path"] = f"/{name}"
        if is_other and what == "split":
            record.data["split"] = "test"
        if what not in ("question", "truth"):
            record.write(record_path(path))
    flags = ("--input_path", tmp_path / "a", "--compare", tmp_path / "b")
    found = {
        "image": "the image of 1 of 2 samples",
        "folder": "perhaps the images, /a against /b",
        "question": "the question of 1 of 2 samples",
        "truth": "the ground truth of 2 of 2 samples",
        "split": "split None against 'test'",
    }[what]
    (note,) = evaluated(*flags)["tasks"]["AI2D"]["notes"]
    assert note == f"Not the engines alone differ: {found}."


def test_another_template_or_folder_alone_is_not_another_question(tmp_path: Path) -> None:
    for name, end in (("a", "\n"), ("b", "")):
        line = short(1, "A", "A")
        line["prompt"] = (
            f"<|im_start|>system\n{name}<|im_end|>{end}<|im_start|>user\n"
            f"<Image><image></Image>\nWhich?<|im_end|>{end}"
        )
        path = write_answers(tmp_path / name, "AI2D", [line])
        record = replace(run_record("AI2D"), image_bytes={"1": 10})
        record.data["input_image_path"] = f"/{name}"
        record.write(record_path(path))
    flags = ("--input_path", tmp_path / "a", "--compare", tmp_path / "b")
    assert evaluated(*flags)["tasks"]["AI2D"]["notes"] == []


def test_the_report_says_what_a_score_is_of(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "fp8", "SPDocVQA", [short(1, "x", "x")])
    record = run_record("SPDocVQA")
    record.data["gt_path"] = ["/data/val_v1.0_withQT.json"]
    record.write(record_path(path))
    path = write_answers(tmp_path / "fp8", "MathVista", [mathvista_line("B")])
    record = run_record("MathVista")
    record.data["gt_path"] = []
    record.write(record_path(path))
    flags = ("--input_path", tmp_path / "fp8", "--report_dir", tmp_path / "report")
    result = run_command(*SCORE, *flags)
    assert result.exit_code == 0, result.stderr
    document = "1 sample of val_v1.0_withQT.json (card: test)"
    for text in (result.stdout, (tmp_path / "report" / "report.html").read_text()):
        assert f"100.00% over {document}" in text
        row = f"SPDocVQA {document}; MathVista 1 sample of split testmini (card: testmini)"
        assert f"fp8 (bfloat16, KV cache bfloat16): {row}" in text


def mathvista_line(answer: str) -> dict[str, Any]:
    return {
        **short("7", answer, "B"),
        "question_type": "multi_choice",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "x", "B": "y"},
    }


def test_changes_stand_beside_their_question_and_truth(tmp_path: Path) -> None:
    line = short(1, "4", "5")
    line["prompt"] = "<|im_start|>user\n<Image><image></Image>\nHow many | owls?<|im_end|>\n"
    write_answers(tmp_path / "a", "ChartQA", [line])
    write_answers(tmp_path / "b", "ChartQA", [{**line, "answer": "5"}])
    flags = ("--input_path", tmp_path / "a", "--report_dir", tmp_path / "r", "--compare")
    text = run_command(*SCORE, *flags, tmp_path / "b").stdout
    assert "| sample | question | truth | a | b | gain |" in text
    assert "| 1 | How many / owls? | 5 | 4 | 5 | -1.00 |" in text
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<td>1</td><td>How many | owls?</td><td>5</td><td>4</td>" in page
    unchanged = run_command(*SCORE, *flags, tmp_path / "a").stdout
    assert "| sample |" not in unchanged, "no table of nothing"


def test_a_table_after_a_list_is_a_table(tmp_path: Path) -> None:
    """Without an empty line between them Markdown takes it for the last item's text."""
    write_answers(tmp_path / "run", "AI2D", [short(1, "", "A")])
    lines = run_command(*SCORE, "--input_path", tmp_path / "run").stdout.splitlines()
    tables = [number for number, line in enumerate(lines) if line.startswith("| part")]
    assert tables
    assert all(lines[number - 1] == "" for number in tables)


def test_answers_that_say_nothing_are_counted(tmp_path: Path) -> None:
    """The reference's normalisation drops articles, and so the option A."""
    answers = [("", "A"), ("the", "A"), ("A", "A"), ("a.", "A"), ("", "B"), ("B", "B")]
    write_answers(tmp_path / "run", "AI2D", [short(i, *a) for i, a in enumerate(answers)])
    report = evaluated("--input_path", tmp_path / "run")["tasks"]["AI2D"]
    assert report["score"] == pytest.approx(500 / 6)
    assert report["notes"] == [
        "Empty answers: 2 of 6; right by the reference's rules though they say nothing: 2."
    ]
    assert report["details"] == {"as it is written": pytest.approx(200 / 6)}


def of_partition(number: int, answer: str) -> dict[str, Any]:
    """Megatron-LM's line: the id counts within the partition, the truth says which sample it is."""
    return {**short(number, answer, answer), "prompt": f"Which is {answer}?"}


def test_megatrons_partitions_number_their_samples_anew(tmp_path: Path) -> None:
    """Five charts shared as two and three; two ranks of the second repeat one."""
    write_answers(tmp_path / "run", "ChartQA", [of_partition(i, f"{i}") for i in range(2)])
    write_answers(
        tmp_path / "run", "ChartQA", [of_partition(i, f"{2 + i}") for i in (0, 2)], partition=1
    )
    path = tmp_path / "run-ChartQA-dprank=1-partition=1.jsonl"
    path.write_text("".join(json.dumps(of_partition(i, f"{2 + i}")) + "\n" for i in (1, 0)))
    report = evaluated("--input_path", tmp_path / "run")["tasks"]["ChartQA"]
    assert (report["num_samples"], report["num_duplicates"], report["score"]) == (5, 1, 100.0)
    merged = json.loads((tmp_path / "run-ChartQA-merged.json").read_text())
    assert [(line["question_id"], line["answer"]) for line in merged] == [
        (i, str(i)) for i in range(5)
    ]


@pytest.mark.parametrize(
    ("sizes", "why"),
    [((3, 2), "a sample of partition 1 is missing"), ((1, 3), "one of partition 0 is")],
)
def test_megatrons_partitions_with_gaps_are_refused(
    sizes: tuple[int, int], why: str, tmp_path: Path
) -> None:
    for partition, size in enumerate(sizes):
        lines = [of_partition(i, f"{partition} {i}") for i in range(size)]
        if size == 2:
            lines[1]["sample_id"] = 2
        write_answers(tmp_path / "run", "OCRBench", [ocr(line) for line in lines], partition)
    result = run_command(*SCORE, "--input_path", tmp_path / "run")
    assert result.exit_code == 2, why
    files = [f"run-OCRBench-dprank=0-partition={k}.jsonl line 1" for k in (1, 0)]
    assert (
        f"{files[0]} and {tmp_path / files[1]} answer different OCRBench samples" in result.stderr
    )


def ocr(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "dataset_name": "x", "data_type": "Doc-oriented VQA"}


def test_one_id_for_two_samples_of_a_file_is_refused(tmp_path: Path) -> None:
    lines = [short("a", "B", "B"), short("a", "B", "C")]
    write_answers(tmp_path / "run", "AI2D", list(lines))
    result = run_command(*SCORE, "--input_path", tmp_path / "run")
    assert result.exit_code == 2
    assert "answer different AI2D samples of the same id 'a'" in result.stderr


def test_partitions_of_run_py_are_never_numbered_anew(tmp_path: Path) -> None:
    for partition in (0, 1):
        path = write_answers(
            tmp_path / "run", "ChartQA", [of_partition(0, str(partition))], partition
        )
        replace(run_record("ChartQA"), partition_id=partition, num_partitions=2).write(
            record_path(path)
        )
    result = run_command(*SCORE, "--input_path", tmp_path / "run")
    assert result.exit_code == 2
    assert "answer different ChartQA samples of the same id 0" in result.stderr


def test_vqa_v2_is_submitted_with_all_questions_of_test2015(tmp_path: Path) -> None:
    """EvalAI refuses a file with another set of ids, in the phase test-dev too."""
    write_answers(tmp_path / "run", "VQAv2", [short(7, "yes", ""), short(9, "2", "")])
    flags = ("--task", "VQAv2", "--input_path", tmp_path / "run")
    (note,) = evaluated(*flags)["tasks"]["VQAv2"]["notes"]
    assert "give v2_OpenEnded_mscoco_test2015_questions.json as --gt_path" in note
    gt = tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json"
    gt.write_text(json.dumps({"questions": [{"question_id": i} for i in (7, 8, 9)]}))
    report = evaluated(*flags, "--gt_path", gt)["tasks"]["VQAv2"]
    assert report["notes"] == []
    assert json.loads(Path(report["submission"]).read_text()) == [
        {"answer": "yes", "question_id": 7},
        {"answer": "", "question_id": 8},
        {"answer": "2", "question_id": 9},
    ]
    gt.write_text(json.dumps({"questions": [{"question_id": i} for i in (8, 9)]}))
    refused = run_command(*SCORE, *flags, "--gt_path", gt)
    assert refused.exit_code == 2
    assert "has no question 7, which was answered" in refused.stderr
    write_answers(tmp_path / "run", "VQAv2", [short(7, "yes", "yes")])
    public = run_command(*SCORE, *flags, "--gt_path", gt)
    assert public.exit_code == 2
    assert "goes with VQAv2's hidden answers" in public.stderr


def test_a_run_of_all_of_test2015_is_a_submission(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "run", "VQAv2", [short(7, "yes", "")])
    record = run_record("VQAv2")
    record.data["gt_path"] = ["/d/v2_OpenEnded_mscoco_test2015_questions.json"]
    record.write(record_path(path))
    assert evaluated("--input_path", tmp_path / "run")["tasks"]["VQAv2"]["notes"] == []


def test_a_file_of_another_task_is_refused(tmp_path: Path) -> None:
    path = write_answers(tmp_path / "run", "AI2D", [short(1, "B", "B")])
    result = run_command(*SCORE, "--input_path", path, "--task", "ChartQA")
    assert result.exit_code == 2
    assert "holds answers of AI2D by its name and --task is ChartQA" in result.stderr
    renamed = path.rename(tmp_path / "mine.jsonl")
    assert evaluated("--input_path", renamed, "--task", "AI2D")["tasks"]["AI2D"]["score"] == 100.0
