"""Captioning: a folder of images and COCO's caption annotations (COCO, Flickr30k, nocaps)."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from evaluation.datasets.prompts import CAPTION
from evaluation.datasets.records import (
    Record,
    RecordError,
    collect,
    field,
    list_in,
    named_file,
    read_json,
)
from evaluation.datasets.sample import DataSet, Location, Sample
from nvlm.program.errors import UserError


def read_captions(location: Location) -> DataSet:
    """A record for each image that has captions or lies in the folder, in the order of the ids."""
    captions: dict[int, list[str]] = defaultdict(list)
    ids_by_name: dict[str, int] = {}
    names_by_id: dict[int, str] = {}
    broken = []
    for path in location.gt_paths:
        value = read_json(path)
        for where, record in list_in(value, path, "annotations"):
            try:
                captions[field(record, "image_id", int)].append(field(record, "caption", str))
            except RecordError as error:
                broken.append(f"{where} {error}")
        for image_id, name in _names(value):
            ids_by_name[Path(name).name], names_by_id[image_id] = image_id, name
    files: dict[int, list[Path]] = {image_id: [] for image_id in captions}
    for path in _files(location.image_dir):
        found = ids_by_name.get(path.name, number_of(path))
        if found is None:
            broken.append(f"{path} is no image of {location.gt_paths[0]} and ends in no image_id")
        else:
            files.setdefault(found, []).append(path)

    def read(_: int, record: Record) -> Sample:
        image_id: int = record["id"]
        if not record["files"]:
            name = names_by_id.get(image_id, str(image_id))
            path = named_file(location.image_dir, {"file_name": name}, "file_name")
            raise RecordError(f"has captions and no file: {path} is missing")
        if len(record["files"]) > 1:
            raise RecordError(f"has several files: {', '.join(map(str, record['files']))}")
        (path,) = record["files"]
        if not captions.get(image_id):
            raise RecordError(f"({path}) has no caption in {location.gt_paths[0]}")
        return Sample(image_id, (path, "\n" + CAPTION), {"ground_truth": captions[image_id]})

    images = [(f"image {i}", {"id": i, "files": files[i]}) for i in sorted(files)]
    return collect(images, read, broken)


def _names(value: object) -> list[tuple[int, str]]:
    """(id, file_name) of COCO's list of images, as far as there is one."""
    images = value.get("images") if isinstance(value, dict) else None
    return [
        (image["id"], image["file_name"])
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict)
        and isinstance(image.get("id"), int)
        and isinstance(image.get("file_name"), str)
    ]


def _files(folder: Path) -> list[Path]:
    """That are not hidden, by name."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    except OSError as error:
        raise UserError(
            f"--input_image_path {folder} cannot be read: {error.strerror}; give the folder of the "
            "images"
        ) from None


def number_of(path: Path) -> int | None:
    """COCO_val2014_000000000042.jpg and 42.jpg are 42."""
    number = re.search(r"(?:^|_)(\d+)$", path.stem)
    return None if number is None else int(number[1])
