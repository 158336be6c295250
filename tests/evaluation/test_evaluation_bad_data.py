"""Bad benchmarks and bad answers: named, counted, and the rest continues."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from evaluation.asking.output_paths import record_path
from evaluation.asking.task_record import TaskRecord
from evaluation.datasets.mmmu import read_mmmu_answers
from evaluation.datasets.sample import Location
from evaluation.packages import require_package
from evaluation.reporting.results import read_results
from evaluation.scoring.score import Truth
from evaluation.scoring.scored import read_truth
from evaluation.tasks import TASKS
from nvlm.program.errors import UserError
from tests.support.benchmarks import (
    Benchmark,
    ai2d,
    chart_qa,
    ocrbench,
    run_record,
    short,
    text_vqa,
    video_mme,
    write_answers,
    write_json,
)
from tests.support.command import (
    EVALUATE,
    GENERATE,
    RUN,
    SCORE,
    Result,
    one_line_error,
    run_command,
)

SOME_FAILED = 1


def run_task(engine_dir: Path, made: Benchmark, prefix: Path, *flags: object) -> Result:
    common = ("--engine_dir", engine_dir, "--device", "cpu", "--output_path", prefix)
    flags = (*flags, "--max_new_tokens", "2")
    return run_command(*GENERATE, *common, *made.run_flags, *flags)


def num_lines(prefix: Path, task: str) -> int:
    path = Path(f"{prefix}-{task}-dprank=0-partition=0.jsonl")
    return len(path.read_text().splitlines())


def test_a_missing_or_broken_image_is_named_and_asked_again_later(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    lost = made.image_dir / "IIIT5K" / "b.png"
    picture = lost.read_bytes()
    lost.unlink()
    (made.image_dir / "IIIT5K" / "c.png").write_bytes(picture[:100])
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    assert result.exit_code == SOME_FAILED
    assert f"OCRBench sample 1: image {lost} cannot be read: No such file" in result.stderr
    assert "OCRBench sample 2: image" in result.stderr
    assert "1 of 3 samples answered, 1 of them now" in result.stderr
    assert "2 failed" in result.stderr
    scored = run_command(*SCORE, "--input_path", tmp_path / "out", "--json")
    assert scored.exit_code == SOME_FAILED
    assert "has 1 of 3 answers; run the same command again to resume" in scored.stderr
    lost.write_bytes(picture)
    again = run_task(float32_engine_dir, made, tmp_path / "out")
    assert "2 of 3 samples answered, 1 of them now" in again.stderr
    assert num_lines(tmp_path / "out", "OCRBench") == 2


def test_broken_records_and_repeated_ids_are_named_and_left_out(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ai2d(tmp_path)
    good = made.gt_paths[0].read_text()
    no_answer = json.dumps({"image": "4.png", "question": "?", "question_id": 5})
    odd = json.dumps({"image": 4, "question": "?", "question_id": 6, "answer": "A"})
    made.gt_paths[0].write_text(good + '{"image": \n' + no_answer + "\n" + good + "[]\n" + odd)
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    assert result.exit_code == SOME_FAILED
    where = made.gt_paths[0]
    for message in (
        f"{where} line 2 is not JSON",
        f"{where} line 3 has no 'answer'",
        f"{where} line 4 has the id 4 of {where} line 1, which counts",
        f"{where} line 5 is a list, expected an object",
        f"{where} line 6 has image 4, expected str",
        "1 of 1 samples answered",
        "0 failed; records that are no samples: 5",
    ):
        assert message in result.stderr, message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "holds no list of records, expected a list or an object with a list 'data'"),
        ("[]", "TextVQA_0.5.1_val.json: it has no record; give the files that"),
        ("[1]", "record 0 is a int, expected an object"),
    ],
)
def test_a_ground_truth_file_that_is_none_is_refused(
    content: str, message: str, tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = text_vqa(tmp_path)
    made.gt_paths[0].write_text(content)
    one_line_error(run_task(float32_engine_dir, made, tmp_path / "out"), message)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_partitions", "2", "--partition_id", "2"), "expected 0 to 1 (--num_partitions 2)"),
        (("--partition_id", "1"), "--partition_id 1 goes with --num_partitions"),
        (("--num_samples_per_partition", "5"), "goes with --num_partitions; give --num_partit"),
        (
            (
                *("--num_partitions", "9", "--partition_id", "4"),
                *("--num_samples_per_partition", "5"),
            ),
            "starts at sample 20 and the data set has 3",
        ),
        (("--partition_id", "-1"), "--partition_id is '-1', expected a whole number from 0"),
        (("--prompt", "?"), "unrecognized arguments: --prompt ?"),
        (("--split", "test"), "--split goes with --task MMMU or MathVista; OCRBench has no use"),
        (("--num_frames", "4"), "--num_frames goes with --task VideoMME; OCRBench has no use"),
        (("--max_num_tiles", "99"), "--max_num_tiles is 99, expected 1 to 6"),
        (("--streaming",), "unrecognized arguments: --streaming"),
        (("--output_path", "/nowhere/at/all"), "lies in no directory that exists"),
        (("--input_image_path", "/nowhere"), "--input_image_path /nowhere is not a directory"),
    ],
)
def test_a_wrong_flag_is_one_line(
    flags: tuple[str, ...], message: str, tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    one_line_error(run_task(float32_engine_dir, made, tmp_path / "out", *flags), message)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("task", "flags", "message"),
    [
        ("ImageNet", (), "--task 'ImageNet' is unknown, expected one of captioning, TextVQA"),
        ("MathVista", (), "--gt_path does not go with --task MathVista: the parquet"),
        ("VideoMME", ("--max_num_tiles", "2"), "--max_num_tiles does not go with --task VideoMME"),
    ],
)
def test_a_wrong_task_is_one_line(
    task: str, flags: tuple[str, ...], message: str, tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = replace(ocrbench(tmp_path), task=task)
    one_line_error(run_task(float32_engine_dir, made, tmp_path / "out", *flags), message)
    assert not list(tmp_path.glob("out*"))


def test_a_file_of_charts_given_twice_is_refused(tmp_path: Path, float32_engine_dir: Path) -> None:
    """Their ids are positions: nothing would part the same question from itself."""
    made = chart_qa(tmp_path)
    twice = replace(made, gt_paths=(*made.gt_paths, made.gt_paths[0]))
    one_line_error(run_task(float32_engine_dir, twice, tmp_path / "out"), "names a file twice")
    assert not list(tmp_path.glob("out*"))


def test_flags_of_tasks_need_a_task(float32_engine_dir: Path, tmp_path: Path) -> None:
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu")
    result = run_command(RUN, *common, "--prompt", "?", "--output_path", tmp_path / "x")
    one_line_error(result, "unrecognized arguments: --output_path")
    result = run_command(*GENERATE, *common, "--output_path", tmp_path / "x")
    one_line_error(result, "required: --task")
    result = run_command(*GENERATE, *common, "--task", "MMMU")
    one_line_error(result, "--task needs --input_image_path")
    paths = ("--input_image_path", tmp_path, "--output_path", tmp_path / "x")
    result = run_command(*GENERATE, *common, "--task", "TextVQA", *paths)
    one_line_error(result, "--task TextVQA needs --gt_path")


@pytest.mark.parametrize("flags", [("--task", "TextVQA"), ("--task=TextVQA",)])
def test_run_says_where_benchmarks_are(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever else of the command is missing or no longer run.py's."""
    for others in ((), ("--engine_dir", tmp_path, "--output_path", tmp_path / "x")):
        for words in ((*flags, *others), (*others, *flags)):
            message = "benchmarks are `evaluate.py generate --task TextVQA`"
            one_line_error(run_command(RUN, *words), message)


@pytest.mark.parametrize("words", [(), ("--input_path", "x"), ("--task", "AI2D"), ("scores",)])
def test_evaluate_names_its_commands(words: tuple[str, ...]) -> None:
    one_line_error(run_command(EVALUATE, *words), "`evaluate.py score", "`evaluate.py generate")


def test_folders_without_parquet_are_refused(float32_engine_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    for task, message in (
        ("MMMU", "has no <subject>/validation-*.parquet; give a copy of the data set MMMU/MMMU"),
        ("MathVista", "has no testmini-*.parquet"),
    ):
        made = Benchmark(task, tmp_path, (), {})
        one_line_error(run_task(float32_engine_dir, made, tmp_path / "out"), message)
    (tmp_path / "testmini-0.parquet").write_bytes(b"PAR1 no")
    made = Benchmark("MathVista", tmp_path, (), {})
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    one_line_error(result, "testmini-0.parquet is not a whole parquet file")


def test_a_missing_video_is_named_and_too_few_images_refused(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    pytest.importorskip("av")
    made = video_mme(tmp_path)
    (made.image_dir / "fFjv93ACGo8.mp4").write_bytes(b"no video")
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    assert result.exit_code == SOME_FAILED
    assert "VideoMME sample 001-1: video" in result.stderr
    assert "2 failed" in result.stderr
    result = run_task(float32_engine_dir, made, tmp_path / "out", "--num_frames", "4")
    one_line_error(result, "asks about 4 images at once and the engine takes 3")


def test_a_missing_package_is_one_line() -> None:
    with pytest.raises(UserError, match=r"MMMU needs the package pyarrow.*evaluation\.txt"):
        require_package("no_such_module.parquet", "pyarrow", "MMMU")


def test_cider_without_java_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    line: dict[str, Any] = {"sample_id": 1, "prompt": "", "caption": "a", "ground_truth": ["a"]}
    write_answers(tmp_path / "run", "captioning", [line])
    with patch("shutil.which", return_value=None):
        result = run_command(*SCORE, "--input_path", tmp_path / "run")
    one_line_error(result, "CIDEr needs Java")


@pytest.mark.process
def test_a_java_that_does_not_work_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    lines = [{"sample_id": i, "caption": "a cat", "ground_truth": ["a", "b"]} for i in (1, 2)]
    write_answers(tmp_path / "run", "captioning", list(lines))
    with patch.dict("os.environ", PATH=f"{tmp_path}:/bin:/usr/bin"):
        result = run_command(*SCORE, "--input_path", tmp_path / "run")
    one_line_error(result, "gave back 1 of 4 captions")


def test_a_task_that_cannot_be_scored_does_not_take_the_others_along(tmp_path: Path) -> None:
    """Three in one prefix: captions without those of people, AI2D, and VQAv2 of two splits."""
    write_answers(tmp_path / "run", "captioning", [{"sample_id": 7, "caption": "a cat"}])
    write_answers(tmp_path / "run", "AI2D", [short(1, "A", "A")])
    write_answers(tmp_path / "run", "VQAv2", [short(1, "a", ""), short(2, "b", "b")])
    flags = ("--input_path", tmp_path / "run", "--report_dir", tmp_path / "report")
    result = run_command(*SCORE, *flags, "--json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert {name: task["score"] for name, task in report["tasks"].items()} == {"AI2D": 100.0}
    printed = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert printed == [f"error: {failure}" for failure in report["failures"]]
    assert len(printed) == 2
    assert printed[0].startswith("error: captioning is not scored: captioning has no captions of")
    assert printed[1].startswith("error: VQAv2 is not scored: ")
    for failure in report["failures"]:
        assert failure in (tmp_path / "report" / "report.md").read_text()
        assert escape(failure) in (tmp_path / "report" / "report.html").read_text()
    (tmp_path / "run-AI2D-dprank=0-partition=0.jsonl").unlink()
    nothing = run_command(*SCORE, *flags)
    one_line_error(nothing, "none of 2 tasks can be scored; captioning is", "; VQAv2 is not scored")


def test_output_of_something_else_is_never_overwritten(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    path = write_answers(tmp_path / "out", "OCRBench", [short(99, "?", "?")])
    before = path.read_bytes()
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    one_line_error(result, "line 1 is no OCRBench answer to a sample of this partition")
    path = write_answers(tmp_path / "out", "OCRBench", [short(0, "?", "?")])
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    one_line_error(result, "holds answers and", "is missing, so what made them is unknown")
    assert path.read_bytes() != before
    assert num_lines(tmp_path / "out", "OCRBench") == 1


def test_evaluate_names_broken_lines_and_scores_the_rest(tmp_path: Path) -> None:
    lines = [short(1, "yes", "yes"), '{"sample_id": 2, "ans', "[]", short(3, "no", "yes")]
    path = write_answers(tmp_path / "run", "ChartQA", list(lines))
    result = run_command(*SCORE, "--input_path", tmp_path / "run", "--json")
    assert result.exit_code == SOME_FAILED
    assert f"{path} line 2 is not JSON and is left out" in result.stderr
    assert f"{path} line 3 is no ChartQA answer" in result.stderr
    report = json.loads(result.stdout)["tasks"]["ChartQA"]
    assert (report["score"], len(report["problems"])) == (50.0, 2)


MCQ = {"index2ans": {"A": "x"}, "all_choices": ["A"]}


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("TextVQA", {"sample_id": 2, "answer": "a"}, "has no 'gt_answer'"),
        ("TextVQA", short([2], "a", "a"), "has sample_id [2], expected int or str"),
        ("TextVQA", short(2, 3, "a"), "has answer 3, expected str"),
        ("TextVQA", short(2, "a"), "has 0 answers in gt_answer"),
        ("ChartQA", short(2, "a", "a", "b"), "has 2 answers in gt_answer, expected one"),
        (
            "OCRBench",
            {**short(2, "a", "a"), "dataset_name": "x", "data_type": "Music"},
            "has data_type 'Music', expected one of Regular Text Recognition",
        ),
        ("MathVista", {**short(2, "a", "a"), "question_type": "open"}, "has question_type 'open'"),
        (
            "MathVista",
            {**short(2, "a", "a"), **MCQ, "question_type": "multi_choice", "index2ans": {}},
            "has no option in index2ans",
        ),
        (
            "VideoMME",
            {"duration_category": "short", "questions": [{"question_id": "1", "response": "A"}]},
            "has no 'answer'",
        ),
    ],
)
def test_a_line_that_its_scorer_cannot_read_is_left_out(
    task: str, line: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_answers(tmp_path / "run", task, [line])
    with pytest.raises(UserError, match=f"no {task} answer to score: .* line 1 is no {task}"):
        read_results(tmp_path / "run", TASKS[task])
    good = {
        **short(1, "a", "a"),
        "dataset_name": "x",
        "data_type": "Doc-oriented VQA",
        **MCQ,
        "question_type": "multi_choice",
        "duration_category": "short",
        "questions": [{"question_id": 1, "response": "A", "answer": "A"}],
    }
    write_answers(tmp_path / "run", task, [good, line])
    results = read_results(tmp_path / "run", TASKS[task])
    assert list(results.lines) == [1]
    (problem,) = results.problems
    assert problem.startswith(f"{path} line 2 is no {task} answer and is left out: it {message}")


def test_a_single_truth_counts_as_a_list(tmp_path: Path) -> None:
    write_answers(tmp_path / "run", "ChartQA", [{**short(1, "yes"), "gt_answer": "yes"}])
    results = read_results(tmp_path / "run", TASKS["ChartQA"])
    assert TASKS["ChartQA"].score(results.lines, Truth()).value == 100.0


def test_evaluate_without_answers_is_one_line(tmp_path: Path) -> None:
    result = run_command(*SCORE, "--input_path", tmp_path / "run")
    one_line_error(result, "has no answers (looked for")
    result = run_command(*SCORE, "--input_path", tmp_path / "run", "--task", "MMMU")
    one_line_error(result, "has no MMMU answers")
    (tmp_path / "other.json").write_text('{\n"merged": []}')
    result = run_command(*SCORE, "--input_path", tmp_path / "other.json", "--task", "MMMU")
    message = "left out; give the --output_path of evaluate.py generate, or"
    one_line_error(result, "line 1 is not JSON and is", message)
    write_answers(tmp_path / "run", "MMMU", [])
    write_answers(tmp_path / "run", "AI2D", [short(1, "A", "A")])
    result = run_command(
        *SCORE, "--input_path", tmp_path / "run", "--task", "AI2D", "--compare", tmp_path / "no"
    )
    one_line_error(result, "--compare", "has no answers")


def test_a_truth_that_would_not_be_read_is_refused(tmp_path: Path) -> None:
    write_answers(tmp_path / "run", "AI2D", [short(1, "A", "A")])
    flags = ("--input_path", tmp_path / "run", "--gt_path", tmp_path / "gt.json")
    result = run_command(*SCORE, *flags)
    one_line_error(result, "--gt_path goes with --task captioning or VQAv2 or MMMU; the answer")


def test_mmmu_without_its_answers_is_one_line(tmp_path: Path) -> None:
    line = {"sample_id": "validation_Art_1", "prompt": "", "text": "B", "prediction": "B"}
    write_answers(tmp_path / "run", "MMMU", [{**line, "question_type": "open"}])
    flags = ("--task", "MMMU", "--input_path", tmp_path / "run")
    one_line_error(run_command(*SCORE, *flags), "give the MMMU repository's answer_dict_val.json")
    gt = write_json(tmp_path / "answers.json", {})
    result = run_command(*SCORE, *flags, "--gt_path", gt)
    one_line_error(result, "has no validation_Art_1 and 0 more")


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([], "holds no answers by id, expected an object"),
        ({"validation_Art_1": "A"}, "entry validation_Art_1 is a str, expected an object"),
        ({"validation_Art_1": {}}, "entry validation_Art_1 has no 'ground_truth'"),
        ({"validation_Art_1": {"ground_truth": [1]}}, "expected a list of strings"),
    ],
)
def test_a_truth_of_mmmu_that_is_none_is_one_line(truth: Any, message: str, tmp_path: Path) -> None:
    line = {"sample_id": "validation_Art_1", "text": "B", "prediction": "B"}
    write_answers(tmp_path / "run", "MMMU", [{**line, "question_type": "open"}])
    gt = write_json(tmp_path / "answers.json", truth)
    with pytest.raises(UserError, match=re.escape(message)):
        read_truth(read_results(tmp_path / "run", TASKS["MMMU"]), gt)


def test_captions_that_are_none_or_missing_are_one_line(tmp_path: Path) -> None:
    write_answers(tmp_path / "run", "captioning", [{"sample_id": 1, "caption": "a cat"}])
    results = read_results(tmp_path / "run", TASKS["captioning"])
    with pytest.raises(UserError, match="image 1 and 0 more; give the annotations as --gt_path"):
        read_truth(results, None)
    gt = write_json(tmp_path / "gt.json", {"annotations": [{"image_id": 1}]})
    with pytest.raises(UserError, match=r"gt\.json record 0 has no 'caption'"):
        read_truth(results, gt)
    write_json(gt, {"annotations": [{"image_id": 1, "caption": "A cat."}]})
    assert read_truth(results, gt).answers == {"1": ["A cat."]}


def test_broken_records_of_vqa_v2_are_named(tmp_path: Path) -> None:
    good = {"question_id": 1, "image_id": 7, "question": "?"}
    records = [good, {"question_id": 2, "question": "?"}, {**good, "question_id": [3]}, 4]
    gt = write_json(tmp_path / "q.json", {"questions": records, "data_subtype": "test-dev2015"})
    found = TASKS["VQAv2"].read(Location(tmp_path, (gt,)))
    assert [sample.id for sample in found.samples] == [1]
    assert found.samples[0].images == [tmp_path / "COCO_test2015_000000000007.jpg"]
    assert found.problems == [
        f"{gt} record 1 has no 'image_id'",
        f"{gt} record 2 has question_id [3], expected int or str",
        f"{gt} record 3 is a int, expected an object",
    ]


def test_a_question_without_annotation_is_named(tmp_path: Path) -> None:
    records = [{"question_id": i, "image_id": 7, "question": "?"} for i in (1, 2)]
    gt = write_json(tmp_path / "q.json", {"questions": records, "data_subtype": "val2014"})
    known = {"question_id": 1, "answers": [{"answer": "yes"}]}
    annotations = write_json(tmp_path / "a.json", {"annotations": [known]})
    found = TASKS["VQAv2"].read(Location(tmp_path, (gt, annotations)))
    assert [sample.fields for sample in found.samples] == [{"gt_answer": ["yes"]}]
    assert found.problems == [f"{gt} record 1 has question_id 2, which has no annotation"]


@pytest.mark.parametrize("label", [["1", "2"], [], "", None, 5])
def test_a_chart_without_its_one_label_is_named(label: Any, tmp_path: Path) -> None:
    good = {"imgname": "a.png", "query": "?", "label": "1"}
    gt = write_json(tmp_path / "gt.json", [good, {**good, "label": label}])
    found = TASKS["ChartQA"].read(Location(tmp_path, (gt,)))
    assert [sample.fields for sample in found.samples] == [{"gt_answer": ["1"]}]
    (problem,) = found.problems
    assert problem.startswith(f"{gt} record 1 has label {label!r}, expected ")


def test_questions_without_answers_among_others_are_named(tmp_path: Path) -> None:
    """Before hours of answering, not when evaluate.py refuses the mixture."""
    public = {"question_id": 1, "image_id": "a", "question": "?", "answers": ["yes"]}
    hidden = {"question_id": 2, "image_id": "b", "question": "?"}
    gt = write_json(tmp_path / "q.json", {"data": [public, hidden]})
    found = TASKS["TextVQA"].read(Location(tmp_path, (gt,)))
    assert [sample.id for sample in found.samples] == [1]
    (problem,) = found.problems
    assert problem.startswith("sample 2 has no answers, as in a test split, and others have")


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("AI2D", {"image": "a", "question_id": 1, "question": "?", "answer": ""}, "has answer ''"),
        (
            "RealworldQA",
            {"image": "1.webp", "question": "?", "question_type": "open", "answer": " "},
            "has answer ' ', expected an answer",
        ),
        *(
            (
                "OCRBench",
                {
                    "image_path": "a",
                    "question": "?",
                    "answers": answers,
                    "dataset_name": "x",
                    "type": "Doc-oriented VQA",
                },
                "expected one or more",
            )
            for answers in ([], [""], "", ["a", ""])
        ),
    ],
)
def test_a_public_truth_that_is_none_is_named(
    task: str, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    text = json.dumps(record if task == "AI2D" else [record])
    gt = tmp_path / "gt.json"
    gt.write_text(text)
    found = TASKS[task].read(Location(tmp_path, (gt,)))
    assert found.samples == []
    assert message in found.problems[0]


def test_a_video_question_with_another_letter_is_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    made = video_mme(tmp_path)
    videos = json.loads(made.gt_paths[0].read_text())
    videos[0]["questions"][0]["answer"] = "A."
    write_json(made.gt_paths[0], videos)
    found = TASKS["VideoMME"].read(Location(made.image_dir, made.gt_paths, num_frames=2))
    assert any("has answer 'A.', expected A, B, C or D" in problem for problem in found.problems)


def test_hidden_files_of_a_folder_are_no_captions(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_bytes(b"")
    (tmp_path / "7.jpg").write_bytes(b"")
    gt = write_json(
        tmp_path.parent / "captions.json", {"annotations": [{"image_id": 7, "caption": "A cat."}]}
    )
    found = TASKS["captioning"].read(Location(tmp_path, (gt,)))
    assert ([sample.id for sample in found.samples], found.problems) == ([7], [])


def test_an_empty_list_of_answers_is_a_hidden_one(tmp_path: Path) -> None:
    record = {"question_id": 1, "image_id": "a", "question": "?", "answers": []}
    gt = write_json(tmp_path / "q.json", {"data": [record]})
    (sample,) = TASKS["TextVQA"].read(Location(tmp_path, (gt,))).samples
    assert sample.fields == {"gt_answer": [""]}


def test_parquet_without_pictures_or_truths_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    row = {"id": "validation_Art_1", "question_type": "open", "question": "?", "subfield": "x"}
    (tmp_path / "Art").mkdir()
    path = tmp_path / "Art" / "validation-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    found = TASKS["MMMU"].read(Location(tmp_path))
    assert found.problems[-1] == f"{path} row 0 has no 'image_1'"
    assert read_mmmu_answers(Location(tmp_path)) == {}


def test_more_partitions_than_samples_leave_an_empty_one(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    flags = ("--num_partitions", "9", "--partition_id", "0")
    result = run_task(float32_engine_dir, made, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.stderr
    assert "0 of 0 samples answered" in result.stderr


def test_a_corrected_data_set_resumes_and_another_is_not_mixed_in(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    """OCRBench's ids are positions: another file has the same ones."""
    made = ocrbench(tmp_path)
    records = json.loads(made.gt_paths[0].read_text())
    write_json(made.gt_paths[0], [*records[:2], {**records[2], "type": "Music"}])
    broken = run_task(float32_engine_dir, made, tmp_path / "out")
    assert broken.exit_code == SOME_FAILED
    write_json(made.gt_paths[0], records)
    corrected = run_task(float32_engine_dir, made, tmp_path / "out")
    assert corrected.exit_code == 0, corrected.stderr
    assert "3 of 3 samples answered, 1 of them now" in corrected.stderr
    other = replace(made, gt_paths=(write_json(tmp_path / "other.json", records),))
    result = run_task(float32_engine_dir, other, tmp_path / "out")
    one_line_error(result, "made with gt_path ['OCRBench.json'] and this run has ['other.json']")


@pytest.mark.parametrize("what", ["question", "truth", "image"])
def test_another_data_set_under_the_same_names_is_noticed(
    what: str, tmp_path: Path, float32_engine_dir: Path
) -> None:
    """Same files, same ids, other content: the answers so far are not to these questions."""
    made = ocrbench(tmp_path)
    assert run_task(float32_engine_dir, made, tmp_path / "out").exit_code == 0
    path = tmp_path / "out-OCRBench-dprank=0-partition=0.jsonl"
    before = path.read_bytes()
    records = json.loads(made.gt_paths[0].read_text())
    if what == "image":
        picture = made.image_dir / records[1]["image_path"]
        picture.write_bytes(picture.read_bytes() + b"\0")
    else:
        key, value = {"question": ("question", "Why?"), "truth": ("answers", ["7"])}[what]
        write_json(made.gt_paths[0], [records[0], {**records[1], key: value}, records[2]])
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    message = "the size of its image" if what == "image" else "its question or ground truth"
    one_line_error(result, f"an answer to sample 1 of another data set: {message} was different")
    assert path.read_bytes() == before
    other = ocrbench(tmp_path / "other")
    again = run_task(float32_engine_dir, other, tmp_path / "out")
    assert "0 of them now" in again.stderr, "the same data set elsewhere"


def test_a_record_of_another_format_is_refused(tmp_path: Path) -> None:
    record = run_record("AI2D")
    record.write(tmp_path / "run.json")
    assert TaskRecord.read(tmp_path / "run.json") == record
    assert replace(record, data={**record.data, "num_frames": 4}).decisive != record.decisive
    values = json.loads((tmp_path / "run.json").read_text())
    write_json(tmp_path / "run.json", {**values, "format_version": 3})
    with pytest.raises(UserError, match="has format_version 3, expected 2; use another --output_"):
        TaskRecord.read(tmp_path / "run.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json cannot be written: Is a directory"):
        record.write(tmp_path / "folder.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": {"num_samples": None}}, "has num_samples None, expected int"),
        ({"engine": {}}, "has no 'digest'"),
        ({"settings": {}}, "has no 'quant_algo'"),
        ({"settings": []}, "has settings [], expected dict"),
        ({"task": {"data": {"input_image_path": "/x"}}}, "has no 'gt_path'"),
        ({"task": {"partition_id": 3}}, "is of partition 3 of 1"),
        ({"task": {"image_bytes": {"1": "many"}}}, "has 1 'many', expected int"),
        ({"more": 1}, "has an unexpected 'more'"),
        ({"task": {"more": 1}}, "has an unexpected 'more'"),
    ],
)
def test_a_record_changed_by_hand_is_one_line(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_answers(tmp_path / "run", "AI2D", [short(1, "A", "A")])
    run_record("AI2D").write(record_path(path))
    values = json.loads(record_path(path).read_text())
    changed = {**changed, "task": {**values["task"], **changed.get("task", {})}}
    write_json(record_path(path), {**values, **changed})
    result = run_command(*SCORE, "--input_path", tmp_path / "run")
    one_line_error(result, "run.json is no record of a run by this version: it", message)


def test_a_truncated_record_is_one_line_and_nothing_is_lost(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    assert run_task(float32_engine_dir, made, tmp_path / "out").exit_code == 0
    record = tmp_path / "out-OCRBench-dprank=0-partition=0.run.json"
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    result = run_task(float32_engine_dir, made, tmp_path / "out")
    one_line_error(result, f"{record} is not valid JSON")
    assert num_lines(tmp_path / "out", "OCRBench") == 3
    record.write_bytes(whole)
    assert "0 of them now" in run_task(float32_engine_dir, made, tmp_path / "out").stderr


def test_a_mixture_of_hidden_and_public_answers_is_refused(tmp_path: Path) -> None:
    write_answers(tmp_path / "run", "VQAv2", [short(1, "a", ""), short(2, "b", "b")])
    result = run_command(*SCORE, "--input_path", tmp_path / "run")
    one_line_error(result, "has 1 answers of a split whose truth is hidden among 2")


def test_partitions_of_different_runs_are_reported(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path)
    for partition, prompt_format in ((0, "hf"), (1, "megatron")):
        flags = ("--num_partitions", "2", "--partition_id", partition)
        flags = (*flags, "--prompt_format", prompt_format)
        assert run_task(float32_engine_dir, made, tmp_path / "out", *flags).exit_code == 0
    result = run_command(*SCORE, "--input_path", tmp_path / "out", "--json")
    assert result.exit_code == SOME_FAILED
    assert "partition 1 was made by another engine or with other settings" in result.stderr


def test_partitions_that_are_missing_are_reported(tmp_path: Path, float32_engine_dir: Path) -> None:
    made = ocrbench(tmp_path)
    flags = ("--num_partitions", "3", "--partition_id", "1")
    assert run_task(float32_engine_dir, made, tmp_path / "out", *flags).exit_code == 0
    result = run_command(*SCORE, "--input_path", tmp_path / "out", "--json")
    assert result.exit_code == SOME_FAILED
    for partition in (0, 2):
        assert f"out-OCRBench is missing partition {partition} of 3" in result.stderr


def test_records_that_were_no_samples_are_reported_beside_the_score(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    """run.py named them, perhaps days ago; once corrected, nothing is reported any more."""
    made = ocrbench(tmp_path)
    records = json.loads(made.gt_paths[0].read_text())
    write_json(made.gt_paths[0], [*records[:2], {**records[2], "type": "Music"}])
    assert run_task(float32_engine_dir, made, tmp_path / "out").exit_code == SOME_FAILED
    flags = ("--input_path", tmp_path / "out", "--json")
    scored = run_command(*SCORE, *flags)
    assert scored.exit_code == SOME_FAILED
    assert (
        "is missing records of the data set that were no samples when they were read: 1"
        in scored.stderr
    )
    assert len(json.loads(scored.stdout)["tasks"]["OCRBench"]["problems"]) == 1
    write_json(made.gt_paths[0], records)
    assert run_task(float32_engine_dir, made, tmp_path / "out").exit_code == 0
    assert run_command(*SCORE, *flags).exit_code == 0


def test_a_record_of_version_1_still_reads(tmp_path: Path) -> None:
    """Before sizes and counts, even; and it may be resumed."""
    path = write_answers(tmp_path / "run", "AI2D", [short(1, "A", "A")])
    record = run_record("AI2D", temperature=0.5)
    sampling = {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "seed": 0}
    neutral = {"engine": record.engine.digest, "stop": [], "sampling": sampling}
    settings = {name: value for name, value in record.settings.items() if name != "temperature"}
    older = {
        "task": record.task,
        "settings": {**settings, **neutral},
        "data": {**record.data, "engine_dir": "/engine"},
        "partition_id": 0,
        "num_partitions": 1,
        "num_samples": 1,
        "format_version": 1,
    }
    write_json(record_path(path), older)
    found = TaskRecord.read(record_path(path))
    assert found == record
    assert found.engine.directory == "/engine"
    assert run_command(*SCORE, "--input_path", tmp_path / "run").exit_code == 0
