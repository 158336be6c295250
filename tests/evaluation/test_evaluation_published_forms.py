"""Benchmarks in the forms in which they are published, where there is more than one, and copies of
them without a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.datasets.parquet import missing_files
from evaluation.datasets.sample import DataSet, Location
from evaluation.reporting.results import read_results
from evaluation.scoring.scored import score_results
from evaluation.tasks import TASKS, answer_line
from nvlm.program.errors import UserError
from tests.support.benchmarks import (
    MMMU_SUBJECTS,
    captioning,
    doc_vqa,
    encoded,
    mmmu,
    video_mme,
    vqa_v2,
    write_answers,
    write_json,
    write_picture,
)
from tests.support.command import GENERATE, SCORE, one_line_error, run_command

pytest.importorskip("pyarrow")
pytest.importorskip("av")

TURN = (
    "In which direction is the front wheel of the car on the right side facing?\n\nA. Left\n"
    "B. Straight\nC. Right\n\nPlease answer directly with only the letter of the correct option "
    "and nothing else."
)
COUNT = "How many cars are there?\nPlease answer directly with a single word or number."


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(task: str, folder: Path, *gt_paths: Path, num_frames: int = 2) -> DataSet:
    return TASKS[task].read(Location(folder, gt_paths, num_frames=num_frames))


@pytest.mark.parametrize("form", ["lines", "list"])
def test_realworld_qa_as_xai_published_it_is_asked_as_it_is(form: str, tmp_path: Path) -> None:
    records = [
        {"image": "0.webp", "question": TURN, "answer": "C"},
        {"image": "12.webp", "question": COUNT, "answer": "3"},
    ]
    gt = tmp_path / "annotations.jsonl"
    lines = "\n".join(json.dumps(record) for record in records)
    gt.write_text(lines if form == "lines" else json.dumps(records, indent=1))
    found = read("RealworldQA", tmp_path, gt)
    assert found.problems == []
    assert [(s.id, s.content, s.fields) for s in found.samples] == [
        (0, (tmp_path / "0.webp", "\n" + TURN), {"gt_answer": ["C"]}),
        (12, (tmp_path / "12.webp", "\n" + COUNT), {"gt_answer": ["3"]}),
    ]


def test_realworld_qa_of_hugging_face_runs_without_a_gt_path(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    rows = [
        {"image": encoded("51"), "question": TURN, "answer": "C"},
        {"image": encoded("7"), "question": COUNT, "answer": "3"},
    ]
    for number, row in enumerate(rows):
        write_parquet(tmp_path / "data" / f"test-0000{number}-of-00002.parquet", [row])
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu", "--max_new_tokens", "2")
    flags = ("--task", "RealWorldQA", "--input_image_path", tmp_path)
    result = run_command(*GENERATE, *common, *flags, "--output_path", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    lines = read_results(tmp_path / "out", TASKS["RealworldQA"]).lines
    assert {i: line["gt_answer"] for i, line in lines.items()} == {0: ["C"], 1: ["3"]}
    assert TURN in lines[0]["prompt"]
    flags = ("--input_path", tmp_path / "out", "--report_dir", tmp_path / "report")
    assert run_command(*SCORE, *flags).exit_code == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"has no test-\*\.parquet; give a copy of the data set xai"
    ):
        read("RealworldQA", tmp_path / "empty")


VIDEO = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "sub_category": "Humanity & History",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
}
OPTIONS = ["A. one.", "B. two.", "C. three.", "D. four."]


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_video_mme_as_published_gives_the_lines_of_its_first_form(
    form: str, tmp_path: Path
) -> None:
    questions = [
        {
            "question_id": f"001-{number}",
            "task_type": "Counting Problem",
            "question": f"Question {number}?",
            "options": OPTIONS,
            "answer": answer,
        }
        for number, answer in ((1, "A"), (2, "D"))
    ]
    if form == "parquet":
        rows = [{**VIDEO, **question} for question in questions]
        gt = write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    else:
        gt = write_json(tmp_path / "videos.json", [{**VIDEO, "questions": questions}])
    made = video_mme(tmp_path / "first")
    first, found = read("VideoMME", made.image_dir, *made.gt_paths), read("VideoMME", tmp_path, gt)
    assert found.problems == []
    assert [sample.video for sample in found.samples] == [tmp_path / "fFjv93ACGo8.mp4"] * 2
    task = TASKS["VideoMME"]
    assert [answer_line(task, s, "", "A") for s in found.samples] == [
        answer_line(task, s, "", "A") for s in first.samples
    ]
    assert [s.text for s in found.samples] == [s.text for s in first.samples]


def test_one_bad_question_of_a_video_leaves_the_others(tmp_path: Path) -> None:
    made = video_mme(tmp_path)
    videos = json.loads(made.gt_paths[0].read_text())
    del videos[0]["questions"][0]["answer"]
    found = read("VideoMME", made.image_dir, write_json(tmp_path / "gt.json", videos))
    assert [sample.id for sample in found.samples] == ["001-2"]
    assert found.problems == [f"{tmp_path / 'gt.json'} record 0 has no 'answer'"]


def test_missing_subjects_of_mmmu_are_named(tmp_path: Path) -> None:
    mmmu(tmp_path)
    assert read("MMMU", tmp_path).problems == []
    for subject in ("Art", "Sociology"):
        (tmp_path / subject / "validation-00000-of-00001.parquet").unlink()
    found = read("MMMU", tmp_path)
    assert len(found.samples) == 2
    assert found.problems == [
        f"{tmp_path} is missing {subject}/validation-*.parquet, one of 30 subjects; download it"
        for subject in ("Art", "Sociology")
    ]
    assert len(MMMU_SUBJECTS) == 30


def test_a_missing_parquet_file_is_reported_before_and_counted_after(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    rows = [{"image": encoded("51"), "question": COUNT, "answer": "3"}]
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", rows)
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu", "--max_new_tokens", "2")
    flags = ("--task", "RealWorldQA", "--input_image_path", tmp_path)
    result = run_command(*GENERATE, *common, *flags, "--output_path", tmp_path / "out")
    assert result.exit_code == 1
    part = "test-00001-of-00002.parquet"
    message = f"{tmp_path / 'data'} is missing {part}, which the names of the others"
    assert result.stderr.startswith(message)
    assert "records that are no samples: 0; missing parts of the data set: 1" in result.stderr


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (["testmini-00000-of-00001-725687bf7a18d64b.parquet"], []),
        (["test-00000-of-00002-6b81bd7f7e2065e6.parquet"], ["test-00001-of-00002.parquet"]),
        (["test-00001-of-00003.parquet"], ["test-00000-of-00003", "test-00002-of-00003"]),
        (["mine.parquet"], []),
    ],
)
def test_the_names_of_parquet_files_state_their_number(
    names: list[str], missing: list[str], tmp_path: Path
) -> None:
    found = missing_files([tmp_path / name for name in names])
    assert len(found) == len(missing)
    for message, name in zip(found, missing, strict=True):
        assert message.startswith(f"{tmp_path} is missing {name}")


def test_a_caption_without_its_image_is_named(tmp_path: Path) -> None:
    made = captioning(tmp_path)
    lost = made.image_dir / "COCO_val2014_000000000074.jpg"
    lost.unlink()
    found = read("captioning", made.image_dir, *made.gt_paths)
    assert [sample.id for sample in found.samples] == [133]
    assert found.problems == [f"image 74 has captions and no file: {lost} is missing"]
    assert len(found.records) == 2, "its place is kept"


def test_names_of_nocaps_are_looked_up(tmp_path: Path) -> None:
    """Open Images names pictures by hexadecimal digits; the captions' file says which is which."""
    names = ["0013ea2087020901.jpg", "000000000000007.jpg"]
    for name in names:
        write_picture(tmp_path / "images" / name, "9")
    gt = write_json(
        tmp_path / "nocaps_val_4500_captions.json",
        {
            "images": [
                {"id": number, "file_name": name, "open_images_id": name[:-4]}
                for number, name in enumerate(names)
            ],
            "annotations": [{"id": k, "image_id": k, "caption": "A thing."} for k in (0, 1)],
        },
    )
    found = read("captioning", tmp_path / "images", gt)
    assert found.problems == []
    assert [(s.id, s.images) for s in found.samples] == [
        (number, [tmp_path / "images" / name]) for number, name in enumerate(names)
    ]
    (tmp_path / "images" / "notes.txt").write_text("")
    (problem,) = read("captioning", tmp_path / "images", gt).problems
    assert problem.endswith("notes.txt is no image of " + f"{gt} and ends in no image_id")


def test_documents_in_one_folder_are_found(tmp_path: Path) -> None:
    made = doc_vqa(tmp_path)
    (sample,) = read("SPDocVQA", tmp_path / "documents", *made.gt_paths).samples
    assert sample.images == [tmp_path / "documents" / "xnbl0037_1.png"]


def test_vqa_v2_in_the_wrong_order_is_refused(tmp_path: Path) -> None:
    made = vqa_v2(tmp_path)
    with pytest.raises(UserError, match="holds annotations, expected the questions file first and"):
        read("VQAv2", made.image_dir, *reversed(made.gt_paths))


@pytest.mark.parametrize(
    ("name", "shown"), [("a\0b", "'a\\x00b"), ("a\ud800", "'a\\ud800"), ("n" * 5000, "nnn...")]
)
@pytest.mark.parametrize(
    ("task", "key"),
    [
        ("TextVQA", "image_id"),
        ("OCRBench", "image_path"),
        ("AI2D", "image"),
        ("RealworldQA", "image"),
        ("VideoMME", "video"),
    ],
)
def test_a_name_that_no_file_can_have_is_named(
    task: str, key: str, name: str, shown: str, tmp_path: Path
) -> None:
    record = {
        key: name,
        "question_id": 1,
        "question": "?",
        "answers": ["A"],
        "answer": "A",
        "dataset_name": "x",
        "type": "Doc-oriented VQA",
        **VIDEO,
        "videoID": name,
        "questions": [],
    }
    gt = write_json(tmp_path / "gt.json", record if task == "AI2D" else [record])
    (problem,) = read(task, tmp_path, gt).problems
    assert f" has {key} '" in problem
    assert shown in problem
    assert problem.endswith(", which no file can be named")
    assert len(problem) < 300


def test_answers_to_mathvistas_test_split_become_its_submission(tmp_path: Path) -> None:
    """As output_test_template_for_leaderboard_submission_response_only.json: answer by pid."""
    line = {"question_type": "free_form", "index2ans": {}, "all_choices": [], "gt_answer": [""]}
    lines = [{**line, "sample_id": pid, "answer": a} for pid, a in (("1001", "2"), ("1002", "No"))]
    write_answers(tmp_path / "run", "MathVista", list(lines))
    scored = score_results(read_results(tmp_path / "run", TASKS["MathVista"]), None)
    assert scored.score is None
    assert scored.submission is not None
    assert json.loads(scored.submission.read_text()) == {"1001": "2", "1002": "No"}


def test_the_prefix_is_no_folder(tmp_path: Path, float32_engine_dir: Path) -> None:
    made = doc_vqa(tmp_path / "data")
    common = ("--engine_dir", float32_engine_dir, "--device", "cpu", *made.run_flags)
    (tmp_path / "o").mkdir()
    result = run_command(*GENERATE, *common, "--output_path", f"{tmp_path / 'o'}/")
    one_line_error(result, f"{tmp_path / 'o'} is a directory, expected what the names of the files")
    assert list(tmp_path.glob("o*")) == [tmp_path / "o"]
