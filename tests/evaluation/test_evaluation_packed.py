"""Benchmarks with their pictures in the rows, and questions of one's own.

Copies from the hub have the columns of the data set cards and of lmms-eval's tasks; VLMEvalKit's
TSV has those that its readers use.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.datasets.sample import DataSet, Location, Sample
from evaluation.tasks import TASKS
from nvlm.program.errors import UserError
from tests.support.benchmarks import SHORT, encoded, write_picture, write_tsv
from tests.support.command import GENERATE, SCORE, one_line_error, run_command

pytest.importorskip("pyarrow")

READ = "Read the number."
LETTERS = "\nA. cat\nB. 51\nAnswer with the option's letter from the given choices directly."
PEOPLE = ["51"] * 6 + ["15"] * 4


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def text(number: str) -> str:
    return base64.b64encode(encoded(number)["bytes"]).decode()


def read(task: str, folder: Path, *gt_paths: Path, split: str | None = None) -> DataSet:
    return TASKS[task].read(Location(folder, gt_paths, split))


def only(data: DataSet) -> Sample:
    assert data.problems == []
    (sample,) = data.samples
    return sample


def check(sample: Sample, sample_id: object, question: str, fields: dict[str, Any]) -> None:
    assert sample.id == sample_id
    picture, asked = sample.content
    assert callable(picture)
    assert picture() == encoded("51")["bytes"]
    assert (asked, sample.fields) == ("\n" + question, fields)


HUB: list[tuple[str, str, dict[str, Any], object, str, dict[str, Any]]] = [
    (
        *("ChartQA", "data/test", {"type": "human_test", "question": READ, "answer": "51"}),
        *(0, READ + SHORT, {"gt_answer": ["51"]}),
    ),
    (
        *("ChartQA", "data/test", {"query": READ, "label": ["51"], "human_or_machine": 0}),
        *(0, READ + SHORT, {"gt_answer": ["51"]}),
    ),
    (
        *("SPDocVQA", "DocVQA/validation"),
        {"questionId": "49153", "question": READ, "answers": ["51", "51."], "docId": 14465},
        *(49153, READ + SHORT, {"gt_answer": ["51", "51."]}),
    ),
    (
        *("InfoVQA", "InfographicVQA/validation"),
        {"questionId": "98313", "question": READ, "answers": ["51"], "data_split": "val"},
        *(98313, READ + SHORT, {"gt_answer": ["51"]}),
    ),
    (
        *("OCRBench", "data/test"),
        {
            "dataset": "IIIT5K",
            "question": READ,
            "question_type": "Regular Text Recognition",
            "answer": ["51"],
        },
        *(0, READ),
        {
            "gt_answer": ["51"],
            "dataset_name": "IIIT5K",
            "data_type": "Regular Text Recognition",
        },
    ),
    (
        *("TextVQA", "data/validation"),
        {"image_id": "003a8ae2ef43b901", "question_id": 34602, "question": READ, "answers": PEOPLE},
        *(34602, READ + SHORT, {"gt_answer": PEOPLE}),
    ),
    (
        *("AI2D", "data/test", {"question": READ, "options": ["cat", "51"], "answer": "1"}),
        *(0, READ + LETTERS, {"gt_answer": ["B"]}),
    ),
    (
        *("VQAv2", "data/validation"),
        {
            "multiple_choice_answer": "51",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                for number, answer in enumerate(PEOPLE)
            ],
            "image_id": 262148,
            "question_id": 262148000,
            "question": READ,
        },
        *(262148000, READ + SHORT, {"gt_answer": PEOPLE}),
    ),
]


@pytest.mark.parametrize(("task", "place", "row", "sample_id", "question", "fields"), HUB)
def test_a_copy_from_the_hub_gives_the_samples_of_the_benchmark(
    tmp_path: Path,
    task: str,
    place: str,
    row: dict[str, Any],
    sample_id: object,
    question: str,
    fields: dict[str, Any],
) -> None:
    write_parquet(tmp_path / f"{place}-00000-of-00001.parquet", [{**row, "image": encoded("51")}])
    check(only(read(task, tmp_path)), sample_id, question, fields)
    check(
        only(read(task, tmp_path / "x", tmp_path / f"{place}-00000-of-00001.parquet")),
        *(sample_id, question, fields),
    )


@pytest.mark.parametrize(
    ("task", "place", "answers"),
    [
        ("TextVQA", "data/test", [""] * 10),
        ("SPDocVQA", "DocVQA/test", None),
        ("VQAv2", "data/testdev", None),
    ],
)
def test_a_split_of_hidden_answers_is_for_a_submission(
    tmp_path: Path, task: str, place: str, answers: object
) -> None:
    row = {"questionId": "7", "question_id": 7, "question": READ, "answers": answers}
    write_parquet(tmp_path / f"{place}-00000-of-00001.parquet", [{**row, "image": encoded("51")}])
    split = place.rpartition("/")[2]
    check(only(read(task, tmp_path, split=split)), 7, READ + SHORT, {"gt_answer": [""]})
    with pytest.raises(
        UserError, match=r"has no validation-\*\.parquet; give a copy of .*lmms-lab"
    ):
        read(task, tmp_path)


KIT: list[tuple[str, dict[str, Any], object, str, dict[str, Any]]] = [
    (
        *("ChartQA", {"question": READ, "answer": "51", "split": "test_human"}),
        *(0, READ + SHORT, {"gt_answer": ["51"]}),
    ),
    (
        *("TextVQA", {"question": READ, "answer": str(PEOPLE)}),
        *(9, READ + SHORT, {"gt_answer": PEOPLE}),
    ),
    (
        *("SPDocVQA", {"question": READ, "answer": "['51', '51.']"}),
        *(9, READ + SHORT, {"gt_answer": ["51", "51."]}),
    ),
    (
        *("OCRBench", {"question": READ, "answer": "['51']"}),
        *(0, READ),
        {
            "gt_answer": ["51"],
            "dataset_name": "HME100k",
            "data_type": "Handwritten Mathematical Expression Recognition",
        },
    ),
    (
        *("AI2D", {"question": READ, "A": "cat", "B": "51", "C": "", "answer": "B"}),
        *(9, READ + LETTERS, {"gt_answer": ["B"]}),
    ),
    (
        *("RealworldQA", {"question": READ, "A": "cat", "B": "51", "answer": "B"}),
        *(9, READ + LETTERS, {"gt_answer": ["B"]}),
    ),
    (
        *("RealworldQA", {"question": READ, "A": "", "answer": "51"}),
        *(9, READ + SHORT, {"gt_answer": ["51"]}),
    ),
]


@pytest.mark.parametrize(("task", "row", "sample_id", "question", "fields"), KIT)
def test_vlmevalkits_tsv_gives_the_samples_of_the_benchmark(
    tmp_path: Path,
    task: str,
    row: dict[str, Any],
    sample_id: object,
    question: str,
    fields: dict[str, Any],
) -> None:
    formulas = "Handwritten Mathematical Expression Recognition"
    whole = {"index": 9, "image": text("51"), **row, "category": formulas}
    check(
        only(read(task, tmp_path, write_tsv(tmp_path / "x.tsv", [whole]))),
        sample_id,
        question,
        fields,
    )


def test_a_tsv_row_may_name_the_row_that_has_its_picture(tmp_path: Path) -> None:
    """VLMEvalKit saves space so. Questions may hold line breaks, tabs and quotes."""
    odd = 'What\tdoes "it"\nsay? é'
    rows = [
        {"index": 3, "image": "5", "question": odd, "answer": "51"},
        {"index": 5, "image": text("51"), "question": odd, "answer": "51"},
        {"index": 6, "image": "8", "question": READ, "answer": "51"},
    ]
    first, second, third = read("ChartQA", tmp_path, write_tsv(tmp_path / "x.TSV", rows)).samples
    check(first, 0, odd + SHORT, {"gt_answer": ["51"]})
    check(second, 1, odd + SHORT, {"gt_answer": ["51"]})
    with pytest.raises(UserError, match="no picture of its own in the row with index '8'"):
        third.images[0]()  # type: ignore[operator]


@pytest.mark.parametrize(
    "cell",
    ["[1, 2", "[51] x", "[a]", "[" + "-" * 100_000 + "1]"],
    ids=lambda cell: f"{cell[:6]}-{len(cell)}",
)
def test_what_only_looks_like_a_list_stays_text(tmp_path: Path, cell: str) -> None:
    """Python's own reader of literals needs more memory for the last than it may take."""
    rows = [{"index": 3, "image": text("51"), "question": READ, "answer": cell}]
    sample = only(read("ChartQA", tmp_path, write_tsv(tmp_path / "x.tsv", rows)))
    assert sample.fields["gt_answer"] == [cell]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "question\tanswer\n1\t2\n", "has no column image nor index"),
        ("x.tsv", 'index\timage\tquestion\n1\t2\t"open', "is not a whole TSV file"),
        ("x.tsv", "index\timage\tquestion\n1\t2\n", "row 0 has 2 columns, expected 3"),
        ("x.parquet", "no", "is not a whole parquet file"),
    ],
)
def test_a_damaged_file_is_one_line(
    tmp_path: Path, float32_engine_dir: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu")
    flags = ("--task", "ChartQA", "--gt_path", tmp_path / name, "--output_path", tmp_path / "out")
    one_line_error(run_command(*GENERATE, *common, *flags), message)


def test_a_tsv_is_answered_and_scored_by_the_commands(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    """It needs no --input_image_path; the report's gallery finds its pictures again."""
    rows = [{"index": n, "image": text("51"), "question": READ, "answer": "51"} for n in range(3)]
    gt = write_tsv(tmp_path / "ChartQA_TEST.tsv", rows)
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu", "--max_new_tokens", "2")
    flags = ("--task", "ChartQA", "--gt_path", gt, "--output_path", tmp_path / "out")
    done = run_command(*GENERATE, *common, *flags)
    assert done.exit_code == 0, done.stderr
    scored = run_command(
        *SCORE, "--input_path", tmp_path / "out", "--report_dir", tmp_path / "report"
    )
    assert scored.exit_code == 0, scored.stderr
    assert "3 samples of ChartQA_TEST.tsv" in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "report.html").read_text().count("data:image/jpeg") >= 3


def test_a_split_goes_with_a_copy_and_not_with_a_file_of_questions(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    row = {"question": READ, "answer": "51", "image": encoded("51")}
    write_parquet(tmp_path / "data" / "val-00000-of-00001.parquet", [row])
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu", "--max_new_tokens", "2")
    flags = ("--task", "ChartQA", "--output_path", tmp_path / "out", "--split", "val")
    done = run_command(*GENERATE, *common, *flags, "--input_image_path", tmp_path)
    assert done.exit_code == 0, done.stderr
    gt = ("--gt_path", tmp_path / "data" / "val-00000-of-00001.parquet")
    one_line_error(run_command(*GENERATE, *common, *flags, *gt), "ChartQA has no use for it")
    one_line_error(
        run_command(*GENERATE, *common, *flags[:4], "--input_image_path", tmp_path / "data" / "x"),
        "--task ChartQA needs --gt_path, the benchmark's questions, or a copy from the hub",
    )
    (tmp_path / "q.json").write_text("[]")
    one_line_error(
        run_command(
            *GENERATE, *common, *flags[:4], *gt, tmp_path / "q.json", "--input_image_path", tmp_path
        ),
        "expected files of one form",
    )


@pytest.mark.parametrize("suffix", [".mkv", ".MP4", ".webm"])
def test_a_video_is_found_with_any_suffix(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"fFjv93ACGo8{suffix}").touch()
    question = {"question_id": "1", "question": "?", "options": ["A", "B", "C", "D"], "answer": "A"}
    video = {"video_id": "1", "duration": "short", "domain": "x", "sub_category": "y"}
    video |= {"url": "https://www.youtube.com/watch?v=fFjv93ACGo8"}
    gt = tmp_path / "videos.json"
    gt.write_text(json.dumps([{**video, "questions": [question]}]))
    assert only(read("VideoMME", tmp_path, gt)).video == tmp_path / f"fFjv93ACGo8{suffix}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "?"}, "has no 'answer'"),
        ({"question": "?", "answer": "  "}, "expected one or more"),
        ({"question": "?", "answer": "1", "answers": ["1"]}, "expected one of them"),
        ({"question": "?", "answer": "1", "img": "a.png"}, "has 'img', expected id, question"),
        ({"prompt": "?", "answer": "1"}, "has no 'question'"),
        ({"question": "?", "answer": "1", "image": "http://a.example/b.png"}, "is an address"),
    ],
)
def test_a_line_of_ones_own_that_is_no_question_is_named(
    tmp_path: Path, line: dict[str, Any], message: str
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    (problem,) = read("custom", tmp_path, tmp_path / "mine.jsonl").problems
    assert problem.startswith(f"{tmp_path / 'mine.jsonl'} line 1 ")
    assert message in problem


def test_pictures_of_ones_own_questions_come_first_in_order(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / name, "1")
    line = {"question": "Which is older?", "images": ["b.png", "a"], "answer": "1"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    sample = only(read("custom", tmp_path, tmp_path / "mine.jsonl"))
    expected = (tmp_path / "b.png", "\n", tmp_path / "a.png", "\n", "Which is older?")
    assert sample.content == expected


def test_pictures_of_ones_own_questions_may_be_urls(tmp_path: Path) -> None:
    path = tmp_path / "a b.png"
    write_picture(path, "1")
    data = path.read_bytes()
    urls = [path.as_uri(), f"data:image/png;base64,{base64.b64encode(data).decode()}"]
    line = {"question": "Which?", "images": urls, "answer": "1"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    sample = only(read("custom", tmp_path, tmp_path / "mine.jsonl"))
    assert sample.content == (path, "\n", data, "\n", "Which?")


def test_a_picture_may_be_a_column_of_bytes(tmp_path: Path) -> None:
    """As a file that was written without the hub's library has it."""
    row = {"query": READ, "label": ["51"], "image": encoded("51")["bytes"]}
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [row])
    picture, _ = only(read("ChartQA", tmp_path)).content
    assert callable(picture)
    assert picture() == encoded("51")["bytes"]


def test_a_copy_without_a_column_of_pictures_is_refused_with_its_columns(tmp_path: Path) -> None:
    row = {"img": encoded("51"), "query": READ, "label": ["51"]}
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [row])
    with pytest.raises(UserError, match="has the columns img, query, label, expected one called i"):
        read("ChartQA", tmp_path)
