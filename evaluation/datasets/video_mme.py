"""VideoMME: a JSON list of videos with their questions, and <YouTube id>.mp4 files.

Every question of a video is a sample (Megatron-LM's reader keeps a video's last one only). Frames
are evenly spaced, each an image of one tile.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.datasets.records import Record, RecordError, collect, field, json_list, string_list
from evaluation.packages import require_package
from evaluation.prompts import video_question
from evaluation.sample import DataSet, Location, Sample
from nvlm.errors import UserError

_VIDEO_KEYS = ("video_id", "duration_category", "video_category", "video_subcategory", "url")
_YOUTUBE = re.compile(r"https://(?:www|m)\.youtube\.com/watch\?v=")


def read_video_mme(location: Location) -> DataSet:
    require_package("av", "av (PyAV)", "VideoMME")
    records = [record for path in location.gt_paths for record in json_list(path)]

    n = location.num_frames

    def read(_: int, record: Record) -> Iterator[Sample]:
        video = {key: field(record, key, (str, int)) for key in _VIDEO_KEYS}
        path = location.image_dir / (_YOUTUBE.sub("", str(video["url"])) + ".mp4")
        decoding = threading.Lock()
        images = tuple(partial(_frame, path, n, index, decoding) for index in range(n))
        for question in field(record, "questions", list):
            choices = string_list(question, "choices")
            if len(choices) != 4:
                raise RecordError(f"has {len(choices)} choices, expected 4")
            text = video_question(field(question, "question", str), choices)
            if (letter := field(question, "answer", str)) not in tuple("ABCD"):
                raise RecordError(f"has answer {letter!r}, expected A, B, C or D")
            sample_id = field(question, "question_id", (str, int))
            fields = {**video, "questions": [question]}
            yield Sample(sample_id, (*images, "\n" + text), fields, path)

    return collect(records, read)


def _frame(path: Path, num_frames: int, index: int, decoding: threading.Lock) -> NDArray[np.uint8]:
    """A video's questions are prepared side by side, and one of them decodes it for all."""
    with decoding:
        return decode_frames(path, num_frames)[index]


@lru_cache(maxsize=16)  # more than are prepared at once, or every frame would decode its video
def decode_frames(path: Path, num_frames: int) -> tuple[NDArray[np.uint8], ...]:
    """Frames spaced as numpy's linspace, RGB [height, width, 3] each; the last few videos' are kept
    for their next question. Raises `UserError` for a video that cannot be read.
    """
    try:
        expected = _num_packets(path)
        wanted = _spaced(expected, num_frames)
        pixels, num_decoded = _pick(path, wanted)
        if num_decoded != expected:  # frames that are never shown, or cannot be decoded
            wanted = _spaced(num_decoded, num_frames)
            pixels, _ = _pick(path, wanted)
        return tuple(pixels[index] for index in wanted)
    except (OSError, ValueError, KeyError, IndexError) as error:  # PyAV's errors are OSErrors
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"video {path} cannot be read: {reason}") from None


def _spaced(num_decoded: int, num_frames: int) -> list[int]:
    return [int(index) for index in np.linspace(0, num_decoded - 1, num_frames)]


def _pick(path: Path, wanted: list[int]) -> tuple[dict[int, NDArray[np.uint8]], int]:
    """The pixels of these frames, as far as there are such, and the number of all."""
    pixels, num_decoded = {}, 0
    for index, frame in enumerate(_decode(path)):
        num_decoded += 1
        if index in wanted:
            pixels[index] = np.asarray(frame.to_ndarray(format="rgb24"))
    if not num_decoded:
        raise ValueError("it has no frames")
    return pixels, num_decoded


def _num_packets(path: Path) -> int:
    """Nearly always the number of frames, and counted without decoding one."""
    av = require_package("av", "av (PyAV)", "VideoMME")
    with av.open(str(path)) as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


def _decode(path: Path) -> Iterator[Any]:
    av = require_package("av", "av (PyAV)", "VideoMME")
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        yield from container.decode(video=0)
