"""Captioning: a folder of images and COCO's caption annotations (COCO, Flickr30k, nocaps)."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from evaluation.datasets.records import Record, RecordError, collect, field, json_list
from evaluation.prompts import CAPTION
from evaluation.sample import DataSet, Location, Sample
from nvlm.errors import UserError


def read_captions(location: Location) -> DataSet:
    """Every file of the folder that is not hidden, by name; its id is the number that ends it."""
    captions: dict[int, list[str]] = defaultdict(list)
    problems = []
    for path in location.gt_paths:
        for where, record in json_list(path, "annotations"):
            try:
                captions[field(record, "image_id", int)].append(field(record, "caption", str))
            except RecordError as error:
                problems.append(f"{where} {error}")
    try:
        found = location.image_dir.iterdir()
        files = sorted(path for path in found if path.is_file() and path.name[0] != ".")
    except OSError as error:
        raise UserError(
            f"--input_image_path {location.image_dir} cannot be read: {error.strerror}; give the "
            "folder of the images"
        ) from None

    def read(_: int, record: Record) -> Sample:
        path: Path = record["path"]
        image_id = image_id_of(path)
        if not captions.get(image_id):
            raise RecordError(f"has no caption in {location.gt_paths[0]}")
        return Sample(image_id, (path, "\n" + CAPTION), {"ground_truth": captions[image_id]})

    data = collect([(str(path), {"path": path}) for path in files], read)
    return DataSet(data.samples, problems + data.problems)


def image_id_of(path: Path) -> int:
    """COCO_val2014_000000000042.jpg and 42.jpg are 42."""
    number = re.search(r"(?:^|_)(\d+)$", path.stem)
    if number is None:
        raise RecordError("does not end in a number, which would be its image_id")
    return int(number[1])
