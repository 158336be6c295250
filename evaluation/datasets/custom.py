"""Questions of one's own: JSON lines with the pictures' names, the question and what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation.datasets.packed import is_packed
from evaluation.datasets.question_answering import find_image
from evaluation.datasets.records import (
    Record,
    RecordError,
    collect,
    field,
    json_lines,
    string_list,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from nvlm.inputs.picture_source import picture_source
from nvlm.program.errors import UserError, shown
from runtime.requests.messages import ImageSource

_KEYS = ("id", "question", "image", "images", "answer", "answers")


def read_custom(location: Location) -> DataSet:
    """A line is {"id", "question", "image" or "images", "answer" or "answers"}; without an id its
    number, from 1, counts. The question is asked as it is. Other keys are refused."""
    if packed := [path for path in location.gt_paths if is_packed(path)]:
        raise UserError(
            f"--gt_path {packed[0]} is no file of JSON lines, which --task custom reads; give one"
        )

    def read(position: int, record: Record) -> Sample:
        question: str = field(record, "question", str)
        if unknown := [key for key in record if key not in _KEYS]:
            raise RecordError(f"has {shown(unknown[0])}, expected {', '.join(_KEYS)}")
        images = _one_or_several(record, "image", "images", or_none=True)
        pictures = [_picture(location.image_dir, name) for name in images]
        content = [part for picture in pictures for part in (picture, "\n")]
        truths = _one_or_several(record, "answer", "answers")
        if not truths or not all(truth.strip() for truth in truths):
            raise RecordError(f"has the answers {shown(truths)}, expected one or more")
        sample_id = field(record, "id", (int, str)) if "id" in record else position + 1
        return Sample(sample_id, (*content, question), {"gt_answer": truths})

    return collect([record for path in location.gt_paths for record in json_lines(path)], read)


def _picture(folder: Path, name: str) -> ImageSource:
    """A data: or file: URL as a request line may have it, or a file as a benchmark names it."""
    try:
        found = picture_source(name, folder)
    except UserError as error:
        raise RecordError(f"cannot be asked: {error}") from None
    is_name = found == folder / name
    return find_image(folder, {"image": name}, "image") if is_name else found


def _one_or_several(record: Record, one: str, several: str, *, or_none: bool = False) -> list[str]:
    if one in record and several in record:
        raise RecordError(f"has {shown(one)} and {shown(several)}, expected one of them")
    if several in record:
        return string_list(record, several)
    if one not in record and or_none:
        return []
    value: Any = field(record, one, str)
    return [value]
