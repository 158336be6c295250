"""Samples worth looking at: their images and tiles as small JPEGs, beside question and answers."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from evaluation.datasets.sample import Location, Sample, SampleId
from evaluation.reporting.compare import Comparison
from evaluation.reporting.results import Results
from evaluation.scoring.score import SampleScore, TaskScore
from nvlm.inputs.images import AS_REFERENCE, load_image
from nvlm.inputs.tiling import TiledImage, tile_image
from nvlm.program.errors import UserError
from runtime.requests.messages import ImageSource
from runtime.requests.show_tiles import draw_tiles

_PICTURE_WIDTH, _SHEET_WIDTH = 420, 960
_SHEETS_IN_A_ROW = 4
_DEFAULT_TILING = (448, 6)

HOW_CHOSEN = (
    "Chosen by a rule, of each task: answers that differ from the other run's first; the rest half "
    "wrong and half right, evenly spread over the data set. Their shares say nothing of the score."
)

Verdict = Literal["right", "partly", "wrong"]


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """A sample that the report shows."""

    task: str  # name of the benchmark
    id: SampleId  # of the sample
    question: str  # its text
    score: SampleScore  # of this run's answer
    other_answer: str | None  # of the run compared with; None: there is none
    picture: str | None  # a data URI; None: `problem` says why
    tiles: str | None  # a data URI; None: as above
    num_tiles: int  # that the model saw
    problem: str | None = None  # why there is no picture

    @property
    def verdict(self) -> Verdict:
        if self.score.value >= 1.0:
            return "right"
        return "partly" if self.score.value > 0.0 else "wrong"


def make_gallery(
    results: Results,
    score: TaskScore,
    comparison: Comparison | None,
    location: Location,
    number: int,
) -> list[GalleryItem]:
    """The changed answers first, then wrong and right ones in turn, spread over the data set."""
    samples = {sample.id: sample for sample in results.task.read(location).samples}
    changed = {c.id: c.other_answer for c in comparison.changes} if comparison else {}
    known = [i for i in score.samples if i in samples]
    chosen = choose(known, score, list(changed), number)
    return [_item(results, samples[i], score.samples[i], changed.get(i)) for i in chosen]


def choose(
    ids: Sequence[SampleId], score: TaskScore, changed: Sequence[SampleId], number: int
) -> list[SampleId]:
    known = set(ids)
    chosen = [i for i in changed if i in known][:number]
    rest = [i for i in ids if i not in chosen]
    wrong = [i for i in rest if score.samples[i].value < 1.0]
    right = [i for i in rest if score.samples[i].value >= 1.0]
    left = number - len(chosen)
    num_wrong = min(len(wrong), max(left - len(right), left - left // 2))
    chosen += _spread(wrong, num_wrong) + _spread(right, left - num_wrong)
    return sorted(chosen, key=ids.index)


def _spread(ids: Sequence[SampleId], number: int) -> list[SampleId]:
    number = min(number, len(ids))
    return [ids[index * len(ids) // number] for index in range(number)]


def _item(
    results: Results, sample: Sample, score: SampleScore, other_answer: str | None
) -> GalleryItem:
    picture = tiles = problem = None
    num_tiles = 0
    try:
        loaded = [_load(source) for source in sample.images]
        tiled = [tile_image(image, *_tiling(results)) for image in loaded]
        num_tiles = sum(image.num_tiles for image in tiled)
        picture = _data_uri(_side_by_side(loaded), _PICTURE_WIDTH)
        tiles = _data_uri(_sheet(tiled), _SHEET_WIDTH)
    except UserError as error:
        problem = str(error)
    return GalleryItem(
        results.task.name,
        sample.id,
        sample.text,
        score,
        other_answer,
        picture,
        tiles,
        num_tiles,
        problem,
    )


def _tiling(results: Results) -> tuple[int, int]:
    """Tile size and the largest grid, as the run had them."""
    if not results.records:
        return _DEFAULT_TILING[0], results.task.max_num_tiles or _DEFAULT_TILING[1]
    settings = results.records[0].settings
    return settings["image_size"], settings["max_num_tiles"]


def _load(source: ImageSource) -> Image.Image:
    if callable(source):
        source = source()
    assert not isinstance(source, TiledImage), "data sets hold pictures"
    return load_image(source, rules=AS_REFERENCE)


def _side_by_side(images: list[Image.Image]) -> Image.Image:
    """The first few frames of a video; a single picture as it is."""
    if len(images) == 1:
        return images[0]
    return _rows([image.convert("RGB") for image in images[:_SHEETS_IN_A_ROW]])


def _sheet(images: list[TiledImage]) -> Image.Image:
    return _rows([draw_tiles([image]) for image in images])


def _rows(sheets: list[Image.Image]) -> Image.Image:
    """Draws at most four in a row, each as wide and high as the largest."""
    columns = min(len(sheets), _SHEETS_IN_A_ROW)
    width, height = (max(sheet.size[axis] for sheet in sheets) for axis in (0, 1))
    size = (columns * width, math.ceil(len(sheets) / columns) * height)
    result = Image.new("RGB", size, (255, 255, 255))
    for index, sheet in enumerate(sheets):
        row, column = divmod(index, columns)
        result.paste(sheet, (column * width, row * height))
    return result


def _data_uri(image: Image.Image, width: int) -> str:
    """A JPEG of at most this width, and at most twice as high."""
    small = image.copy()
    small.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def gallery_location(results: Results, image_dir: Path | None) -> Location | None:
    """Where the run had its data, unless --input_image_path says otherwise."""
    if not results.records:
        return None
    location = results.records[0].location
    if image_dir is not None:
        return Location(image_dir, location.gt_paths, location.split, location.num_frames)
    return location
