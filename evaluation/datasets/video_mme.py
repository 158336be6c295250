"""VideoMME: videos with their questions, and files called <YouTube id>.mp4, .mkv, .webm, ...

Read are lmms-lab/Video-MME's parquet file (a row for each question), Video-MME's JSON list of
videos, and that list with the names of its first version, which Megatron-LM expects and answer
lines have. Every question of a video is a sample (Megatron-LM's reader keeps a video's last one
only). Frames are evenly spaced, each an image of one tile.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.datasets.parquet import NO_PICTURES, ParquetFile, missing_files
from evaluation.datasets.prompts import video_question
from evaluation.datasets.records import (
    Record,
    RecordError,
    collect,
    field,
    json_list,
    named_file,
    string_list,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from evaluation.datasets.video_frames import decode_frames
from evaluation.packages import require_package
from nvlm.program.errors import shown

_PUBLISHED = {
    "video_id": "video_id",
    "duration_category": "duration",
    "video_category": "domain",
    "video_subcategory": "sub_category",
    "url": "url",
}
"""What an answer line calls a value of the video -> what the published files call it now."""
_QUESTION_KEYS = ("question_id", "task_type", "question", "options", "answer")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v")
_YOUTUBE = re.compile(r"https://(?:www|m)\.youtube\.com/watch\?v=")


def read_video_mme(location: Location) -> DataSet:
    require_package("av", "av (PyAV)", "VideoMME")
    records = [record for path in location.gt_paths for record in _records(path)]
    n = location.num_frames
    videos = _videos(location.image_dir)
    decoding: dict[Path, threading.Lock] = {}

    def read(_: int, record: Record) -> Iterator[Sample | RecordError]:
        is_published = not isinstance(record, dict) or "duration_category" not in record
        video = {
            key: field(record, published if is_published else key, (str, int))
            for key, published in _PUBLISHED.items()
        }
        name = record.get("videoID") or _YOUTUBE.sub("", str(video["url"]))
        expected = named_file(location.image_dir, {"video": f"{name}.mp4"}, "video")
        path = videos.get(expected.stem, expected)
        lock = decoding.setdefault(path, threading.Lock())
        images = tuple(partial(_frame, path, n, index, lock) for index in range(n))
        for question in _questions(record):
            try:
                sample_id, text, asked = _question(question, is_published)
            except RecordError as error:
                yield error
                continue
            yield Sample(sample_id, (*images, "\n" + text), {**video, "questions": [asked]}, path)

    return collect(records, read, missing_files(location.gt_paths))


def _videos(folder: Path) -> dict[str, Path]:
    """The videos of a folder by their names without suffix; of several the first suffix counts."""
    found: dict[str, Path] = {}
    files = [path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES]
    for path in sorted(files, key=lambda path: VIDEO_SUFFIXES.index(path.suffix.lower())):
        found.setdefault(path.stem, path)
    return found


def _records(path: Path) -> list[tuple[str, Any]]:
    if path.suffix == ".parquet":
        return list(ParquetFile(path, NO_PICTURES, "VideoMME").records())
    return json_list(path)


def _questions(record: Record) -> list[Any]:
    """A parquet row is of one question."""
    if "questions" not in record and "question_id" in record:
        return [{key: record[key] for key in _QUESTION_KEYS if key in record}]
    questions: list[Any] = field(record, "questions", list)
    return questions


def _question(question: Any, is_published: bool) -> tuple[int | str, str, Record]:
    """Its id, what is asked, and the record as answer lines have it."""
    key = "options" if is_published else "choices"
    choices = string_list(question, key)
    if len(choices) != 4:
        raise RecordError(f"has {len(choices)} {key}, expected 4")
    text = video_question(field(question, "question", str), choices)
    if (letter := field(question, "answer", str)) not in tuple("ABCD"):
        raise RecordError(f"has answer {shown(letter)}, expected A, B, C or D")
    sample_id: int | str = field(question, "question_id", (str, int))
    asked = {"choices" if name == key else name: value for name, value in question.items()}
    return sample_id, text, asked


def _frame(path: Path, num_frames: int, index: int, decoding: threading.Lock) -> NDArray[np.uint8]:
    """A video's questions are prepared side by side, and one of them decodes it for all."""
    with decoding:
        return decode_frames(path, num_frames)[index]
