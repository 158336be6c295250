"""Every benchmark end to end: published files in, the lines by hand out, scores by hand."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.datasets import video_frames
from evaluation.datasets.sample import Location
from evaluation.datasets.video_frames import Packets, decode_frames
from evaluation.reporting.compare import compare
from evaluation.reporting.results import read_results
from evaluation.scoring.scored import score_results
from evaluation.tasks import TASKS, find_task
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.conftest import BF16, FP8, Workshop
from tests.support.benchmarks import MAKERS, READ_NUMBER, Benchmark, ocrbench, text_vqa, write_video
from tests.support.command import GENERATE, ROOT, RUN, SCORE, Result, run_command

TRAINED_MODEL = ROOT / "models" / "nvlm-d-tiny"
pytest.importorskip("pyarrow")
pytest.importorskip("av")


@pytest.fixture(scope="module")
def reading_engine_dir(workshop: Workshop) -> Path:
    """The trained model in bfloat16; five places in a batch."""
    checkpoint = workshop.checkpoint("checkpoint_reading", TRAINED_MODEL, BF16)
    return workshop.engine(
        "engine_reading", checkpoint, vision="torch", max_num_images=3, max_batch_size=5
    )


def run_task(engine_dir: Path, benchmark: Benchmark, prefix: Path, *flags: object) -> Result:
    common = ("--engine_dir", engine_dir, "--device", "cpu", "--output_path", prefix)
    return run_command(*GENERATE, *common, *benchmark.run_flags, *flags)


def read_lines(prefix: Path, task: str, partition: int = 0) -> list[dict[str, Any]]:
    """In the order of the ids: a file has them as they were answered."""
    path = Path(f"{prefix}-{task}-dprank=0-partition={partition}.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line.get("sample_id", ""))


def with_unknown_answers(expected: Any, found: Any) -> Any:
    """`expected` with what it leaves open (None) as `found` has it."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return {key: with_unknown_answers(expected[key], found.get(key)) for key in expected}
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = zip(expected, found, strict=True)
        return [with_unknown_answers(ours, theirs) for ours, theirs in pairs]
    return found if expected is None and isinstance(found, str) else expected


@pytest.mark.parametrize(
    "name",
    # CIDEr's tokenizer is a program of its own.
    [pytest.param(n, marks=pytest.mark.process if n == "captioning" else ()) for n in MAKERS],
)
def test_a_task_writes_the_lines_and_gets_the_score_by_hand(
    name: str, tmp_path: Path, reading_engine_dir: Path
) -> None:
    made = MAKERS[name](tmp_path / "data")
    asked = replace(made, task=name.upper())
    result = run_task(reading_engine_dir, asked, tmp_path / "out", "--max_new_tokens", "16")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    found = read_lines(tmp_path / "out", name)
    lines = {
        line["sample_id"] if "sample_id" in line else line["questions"][0]["question_id"]: line
        for line in found
    }
    assert len(found) == len(lines)
    assert {line.pop("finish_reason") for line in lines.values()} <= {"stop", "length"}
    for sample_id, expected in made.lines.items():
        wanted = with_unknown_answers(expected, lines[sample_id])
        assert lines[sample_id] == wanted
        assert list(lines[sample_id]) == list(wanted), "the order of the fields"
    assert lines.keys() == made.lines.keys()
    gt = ("--gt_path", made.truth) if made.truth else ()
    flags = ("--task", name, "--input_path", tmp_path / "out", "--json", *gt)
    scored = run_command(*SCORE, *flags)
    assert scored.exit_code == 0, scored.stderr
    report = json.loads(scored.stdout)["tasks"][name]
    assert report["num_samples"] == len(made.lines)
    if made.score is not None:
        assert report["score"] == pytest.approx(made.score)


def test_every_task_has_a_test() -> None:
    assert set(MAKERS) == set(TASKS)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mmmu", "MMMU"),
        ("DocVQA", "SPDocVQA"),
        ("realworldqa", "RealworldQA"),
        ("RealWorldQA", "RealworldQA"),
        ("Captioning", "captioning"),
        ("video-mme", "VideoMME"),
    ],
)
def test_names_match_in_any_case(given: str, name: str) -> None:
    assert find_task(given).name == name


def test_pictures_are_not_turned_upright_as_the_reference_does_not(
    tmp_path: Path, float32_engine_dir: Path, images: Callable[[str], Path]
) -> None:
    """The same pixels with and without orientation metadata give the same answer in a task."""
    made = text_vqa(tmp_path)
    turned = images("exif_orientation_6.jpg")
    answers = []
    for name, keep in (("a", True), ("b", False)):
        picture = Image.open(turned)
        picture.save(
            tmp_path / "images" / "4f2a.jpg",
            quality=95,
            exif=picture.getexif() if keep else Image.Exif(),
        )
        assert run_task(float32_engine_dir, made, tmp_path / name).exit_code == 0
        answers.append(
            {line["sample_id"]: line["answer"] for line in read_lines(tmp_path / name, "TextVQA")}
        )
    assert answers[0] == answers[1]


def test_video_frames_are_spaced_evenly_and_of_one_tile_each(tmp_path: Path) -> None:
    """Frame k of 9 is as bright as 25 k; three frames are 0, 4 and 8."""
    import av

    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for k in range(9):
            pixels = np.full((64, 64, 3), 25 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    brightness = [round(float(frame.mean()) / 25) for frame in decode_frames(path, 3)]
    assert brightness == [0, 4, 8]


def test_partitions_share_the_samples_and_are_scored_as_one(
    tmp_path: Path, reading_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path / "data")
    prefix = tmp_path / "out"
    for partition in (0, 1):
        flags = ("--num_partitions", "2", "--partition_id", partition)
        assert run_task(reading_engine_dir, made, prefix, *flags).exit_code == 0
    # numpy's linspace(0, 3, 3) cut to whole numbers: 0, 1, 3.
    ids = [{line["sample_id"] for line in read_lines(prefix, "OCRBench", k)} for k in (0, 1)]
    assert ids == [{0}, {1, 2}]
    second = Path(f"{prefix}-OCRBench-dprank=0-partition=1.jsonl")
    lines = sorted(second.read_text().splitlines(keepends=True), reverse=True)
    second.write_text("".join(lines))  # answers are written as they end
    result = run_command(*SCORE, "--input_path", prefix, "--json")
    assert json.loads(result.stdout)["tasks"]["OCRBench"]["score"] == made.score
    merged = json.loads(Path(f"{prefix}-OCRBench-merged.json").read_text())
    assert [line["sample_id"] for line in merged] == [0, 1, 2]


def test_a_stopped_run_resumes_and_repeats_nothing(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    """What a killed run leaves: two whole lines, one half; the third is asked again."""
    made = ocrbench(tmp_path / "data")
    prefix = tmp_path / "out"
    assert run_task(float32_engine_dir, made, prefix).exit_code == 0
    path = Path(f"{prefix}-OCRBench-dprank=0-partition=0.jsonl")
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    marked = lines[0].replace('"answer": "', '"answer": "kept ')
    path.write_text(marked + lines[1] + lines[2][:40])
    result = run_task(float32_engine_dir, made, prefix)
    assert result.exit_code == 0, result.stderr
    assert "3 of 3 samples answered, 1 of them now" in result.stderr
    assert path.read_text() == marked + lines[1] + lines[2]
    again = run_task(float32_engine_dir, made, prefix)
    assert "0 of them now" in again.stderr
    assert path.read_text() == marked + lines[1] + lines[2]


def test_answers_of_another_engine_are_not_mixed_in(
    tmp_path: Path, float32_engine_dir: Path, engine_dir: Path
) -> None:
    made = ocrbench(tmp_path / "data")
    assert run_task(float32_engine_dir, made, tmp_path / "out").exit_code == 0
    result = run_task(engine_dir, made, tmp_path / "out")
    assert result.exit_code == 2
    folders = (float32_engine_dir.resolve(), engine_dir.resolve())
    message = r"made with engine {} \([0-9a-f]{{8}}\) and this run has {} \([0-9a-f]{{8}}\); choose"
    assert re.search(message.format(*(re.escape(str(folder)) for folder in folders)), result.error)
    assert "choose another --output_path" in result.error
    longer = run_task(float32_engine_dir, made, tmp_path / "out", "--max_new_tokens", "9")
    assert "made with max_new_tokens 128 and this run has 9" in longer.error


def test_flags_of_sampling_and_prompt_reach_the_requests(
    tmp_path: Path, float32_engine_dir: Path
) -> None:
    made = ocrbench(tmp_path / "data")
    flags = ("--max_new_tokens", "3", "--prompt_format", "hf", "--system", "Be brief.")
    assert run_task(float32_engine_dir, made, tmp_path / "out", *flags).exit_code == 0
    assert read_lines(tmp_path / "out", "OCRBench")[0]["prompt"] == (
        "<|im_start|>system\nBe brief.<|im_end|>"
        f"<|im_start|>user\n<Image><image></Image>\n{READ_NUMBER}<|im_end|>"
    )
    record = json.loads((tmp_path / "out-OCRBench-dprank=0-partition=0.run.json").read_text())
    assert record["settings"]["max_new_tokens"] == 3


def test_answers_are_those_of_a_batch_file(tmp_path: Path, float32_engine_dir: Path) -> None:
    """The same questions through --input_file, which shares no code with the task's loop."""
    made = ocrbench(tmp_path / "data")
    assert run_task(float32_engine_dir, made, tmp_path / "out").exit_code == 0
    requests = [
        {
            "id": number,
            "prompt": record["question"],
            "images": [str(made.image_dir / record["image_path"])],
            "prompt_format": "megatron",
            "max_new_tokens": 128,
        }
        for number, record in enumerate(json.loads(made.gt_paths[0].read_text()))
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in requests))
    flags = ("--input_file", tmp_path / "in.jsonl", "--output_file", tmp_path / "answers.jsonl")
    run_command(RUN, "--engine_dir", float32_engine_dir, "--device", "cpu", *flags)
    batch = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    expected = {line["id"]: line["text"].strip().split("\n")[0] for line in batch}
    assert expected == {
        line["sample_id"]: line["answer"] for line in read_lines(tmp_path / "out", "OCRBench")
    }


@pytest.mark.slow
def test_fp8_costs_the_small_model_little_and_the_comparison_says_so(
    tmp_path: Path, workshop: Workshop, reading_engine_dir: Path
) -> None:
    """What docs/evaluation.md does with the 72B model, on 40 pictures never seen in training."""
    from tools.tiny.evaluation import samples

    checkpoint = workshop.checkpoint("checkpoint_reading_fp8", TRAINED_MODEL, FP8)
    fp8 = workshop.engine("engine_reading_fp8", checkpoint, vision="torch", max_batch_size=5)
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for sample in (*samples("number", 20), *samples("word", 20)):
        assert sample.image is not None
        sample.image.save(folder / f"{sample.id}.png")
        records.append(
            {
                "dataset_name": "tiny",
                "image_path": f"{sample.id}.png",
                "question": sample.question,
                "answers": sample.answer,
                "type": "Regular Text Recognition",
            }
        )
    gt = tmp_path / "OCRBench.json"
    gt.write_text(json.dumps(records))
    made = Benchmark("OCRBench", folder, (gt,), {})
    for name, engine in (("bf16", reading_engine_dir), ("fp8", fp8)):
        assert run_task(engine, made, tmp_path / name).exit_code == 0
    task = TASKS["OCRBench"]
    bf16_score, fp8_score = (
        score_results(read_results(tmp_path / name, task), None).score for name in ("bf16", "fp8")
    )
    assert bf16_score is not None
    assert fp8_score is not None
    # The card of the small model promises more; a substring is enough here.
    assert bf16_score.value >= 32
    assert fp8_score.value >= bf16_score.value - 4
    comparison = compare(fp8_score, bf16_score, "points")
    assert comparison.num_paired == 40
    assert comparison.p_value > 0.05


def test_a_short_video_gives_a_frame_several_times(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", ["1", "2"])
    assert len(decode_frames(tmp_path / "v.mp4", 4)) == 4


def test_a_video_is_decoded_once_for_all_its_frames_and_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight threads prepare as many samples side by side, each of other videos or of the same."""
    decoded: list[Path] = []

    def decode(path: Path) -> Iterator[Any]:
        decoded.append(path)
        time.sleep(0.02)
        yield SimpleNamespace(rotation=0, to_ndarray=lambda **_: np.zeros((2, 2, 3), np.uint8))

    monkeypatch.setattr(video_frames, "_decode", decode)
    monkeypatch.setattr(video_frames, "_packets", lambda _: Packets(1))
    video = {"video_id": "1", "duration_category": "short", "video_category": "x"}
    videos = [
        {
            **video,
            "video_subcategory": "y",
            "url": f"v{number}",
            "questions": [
                {
                    "question_id": f"{number}-{k}",
                    "question": "?",
                    "answer": "A",
                    "choices": ["A. a", "B. b", "C. c", "D. d"],
                }
                for k in range(2)
            ],
        }
        for number in range(8)
    ]
    gt = tmp_path / "videos.json"
    gt.write_text(json.dumps(videos))
    samples = TASKS["VideoMME"].read(Location(tmp_path, (gt,), num_frames=8)).samples
    decode_frames.cache_clear()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda sample: [image() for image in sample.images], samples))
    assert sorted(decoded) == [tmp_path / f"v{number}.mp4" for number in range(8)]


@pytest.mark.parametrize("num_packets", [9, 12, 1, 0])
def test_a_wrong_count_of_packets_costs_time_and_no_frame(
    num_packets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are frames, or more, or fewer; then the video is decoded again."""
    num_decoded = 0

    def decode(_: Path) -> Iterator[Any]:
        nonlocal num_decoded
        num_decoded += 1
        for number in range(9):
            yield SimpleNamespace(
                rotation=0, to_ndarray=lambda n=number, **_: np.full((1, 1, 3), n, np.uint8)
            )

    monkeypatch.setattr(video_frames, "_decode", decode)
    monkeypatch.setattr(video_frames, "_packets", lambda _: Packets(num_packets))
    decode_frames.cache_clear()
    found = [int(frame[0, 0, 0]) for frame in decode_frames(tmp_path / "v.mp4", 3)]
    assert found == [0, 4, 8]
    assert num_decoded == (1 if num_packets == 9 else 2)


class BrokenDecoder:
    """Raises in its first step, as an executor with a mistake would."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def step(self) -> Any:
        raise ZeroDivisionError("a mistake of ours")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def test_a_mistake_of_ours_ends_the_run_as_itself(tmp_path: Path, float32_engine_dir: Path) -> None:
    made = ocrbench(tmp_path / "data")
    samples = TASKS["OCRBench"].read(Location(made.image_dir, made.gt_paths)).samples
    runner = Runner.open(float32_engine_dir, torch.device("cpu"))
    broken = Runner(runner.engine, runner.vision, BrokenDecoder(runner.decoder))
    with pytest.raises(ZeroDivisionError):
        list(broken.generate_batch([GenerationRequest(s.content) for s in samples * 20]))
