"""Calibration samples: questions with images, as the runtime would see them.

`--calib_data` is a JSONL file of `{"prompt": ..., "images": [...]}` (or `"image"` for one). Images
are paths relative to the file, or data: and file: URLs, as in run.py's request lines. It may also
be a folder of images, or a .txt file with a question on each line. The built-in set (photographs,
documents and text-only questions in `calibration_data/`) is the default.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from build.conversion.report.quantization_report import QuantizationReport
from nvlm.formats.tensor_names import VISION_LAYER
from nvlm.inputs.images import make_of_pages
from nvlm.inputs.picture_source import picture_source
from nvlm.inputs.prompt import Prompt, build_prompt, images_first
from nvlm.inputs.tiling import TiledImage, Tiler
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.model.config import NVLMConfig, TilingConfig
from nvlm.program.errors import UserError, shown
from nvlm.program.jsonl import read_jsonl_lines

_EXPECTED = 'expected {"prompt": "...", "images": ["path", ...]} on each line'
_FOLDER_QUESTION = "Describe this image in detail."

BUILT_IN = Path(__file__).parent / "calibration_data" / "calibration.jsonl"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CalibrationSample:
    """A prompt and its images, which stay on disk until they are needed."""

    prompt: Prompt  # ids; those of tiles are virtual tokens
    images: tuple[Path | bytes, ...]  # files, in the order of the prompt
    num_tiles: int  # of all images, thumbnails included
    tiling: TilingConfig  # how they are cut

    def load_tiles(self) -> NDArray[np.uint8]:
        """[num_tiles, S, S, 3], all images of the prompt in order (may be none)."""
        size = self.tiling.image_size
        none = np.empty((0, size, size, 3), np.uint8)
        return np.concatenate([none, *(i.tiles for i in _tile(self.images, self.tiling))])


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples, or the report of an earlier conversion that stands for them, or nothing."""

    samples: tuple[CalibrationSample, ...] = ()  # in the order of the file
    num_skipped: int = 0  # samples whose images could not all be read
    cache: QuantizationReport | None = None  # the earlier report; None: the samples are measured
    # Over everything the samples feed into the model, or over the report; None: nothing is used.
    sha256: str | None = None

    @property
    def counts(self) -> tuple[int, int]:
        """Samples that ran and that were skipped, here or where the cache was made."""
        if self.cache is not None:
            return self.cache.num_samples, self.cache.num_skipped
        return len(self.samples), self.num_skipped

    @property
    def num_tiles(self) -> int:
        return sum(sample.num_tiles for sample in self.samples)

    @property
    def is_text_only(self) -> bool:
        """Whether it has no pictures, so that it measures nothing of vision."""
        if self.cache is not None:
            vision = VISION_LAYER.partition("{")[0]
            return not any(row.linear.startswith(vision) for row in self.cache.linears)
        return self.num_tiles == 0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample.prompt.token_ids) for sample in self.samples]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of the calibration data, as it is written."""

    where: str  # file and line, for messages
    question: str  # text of the prompt
    images: tuple[Path | str, ...]  # before the text: files, or names as request lines have them


def load_calibration_set(
    path: Path, num_samples: int, config: NVLMConfig, tokenizer: Tokenizer
) -> Calibration:
    """The first `num_samples` samples. One whose images cannot all be read is skipped and counted;
    anything else that is wrong, and nothing being left, is a `UserError` that names file and line.

    Memory: the tiles of one sample.
    """
    samples: list[CalibrationSample] = []
    digest = hashlib.sha256()
    num_skipped = 0
    for entry in _entries(path):
        if len(samples) == num_samples:
            break
        try:
            images = tuple(_source(image, path.parent) for image in entry.images)
            tiled = _tile(images, config.tiling)
        except UserError as error:
            log.warning("%s is skipped: %s", entry.where, error)
            num_skipped += 1
            continue
        num_tiles = [image.num_tiles for image in tiled]
        sample = _sample(entry, images, num_tiles, config, tokenizer)
        digest.update(json.dumps(sample.prompt.token_ids).encode())
        for image in tiled:
            digest.update(image.tiles.tobytes())
        samples.append(sample)
    if not samples:
        what = f"{num_skipped} unreadable images and nothing else" if num_skipped else "no samples"
        raise UserError(f"--calib_data {path} has {what}; {_EXPECTED}, or a folder of images")
    if num_skipped:
        log.warning("%d samples of --calib_data %s were skipped", num_skipped, path)
    return Calibration(tuple(samples), num_skipped, sha256=digest.hexdigest())


def _tile(images: tuple[Path | bytes, ...], tiling: TilingConfig) -> list[TiledImage]:
    tiler = Tiler(tiling.image_size, tiling.max_num_tiles)
    return [next(make_of_pages(tiler, path)) for path in images]


def _source(image: Path | str, folder: Path) -> Path | bytes:
    return image if isinstance(image, Path) else picture_source(image, folder)


def _entries(path: Path) -> Iterator[_Entry]:
    if path.is_dir():
        for image in sorted(path.rglob("*")):
            if image.is_file() and not image.name.startswith("."):
                yield _Entry(f"--calib_data {image}", _FOLDER_QUESTION, (image,))
        return
    for number, line in read_jsonl_lines(path, "--calib_data"):
        where = f"--calib_data {path} line {number}"
        if path.suffix == ".txt":
            yield _Entry(where, line, ())
            continue
        try:
            question, names = _parse(line)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        yield _Entry(where, question, tuple(names))


def _parse(line: str) -> tuple[str, list[str]]:
    """Question and image names of a JSONL line."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); {_EXPECTED}") from None
    if not isinstance(values, dict):
        raise UserError(f"a JSON {type(values).__name__}; {_EXPECTED}")
    question, names = values.get("prompt"), values.get("images", [])
    if not isinstance(question, str):
        raise UserError(f"prompt is {shown(question)}; {_EXPECTED}")
    if "image" in values and not names:
        names = [values["image"]]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"images is {shown(names)}, not a list of paths; {_EXPECTED}")
    return question, names


def _sample(
    entry: _Entry,
    images: tuple[Path | bytes, ...],
    num_tiles: list[int],
    config: NVLMConfig,
    tokenizer: Tokenizer,
) -> CalibrationSample:
    try:
        prompt = build_prompt(
            images_first(num_tiles, entry.question),
            tokenizer,
            tokens_per_tile=config.vision.tokens_per_tile,
            vocab_size=config.decoder.vocab_size,
        )
    except UserError as error:
        raise UserError(f"{entry.where}: {error}") from None
    if len(prompt.token_ids) > config.decoder.max_position_embeddings:
        raise UserError(
            f"{entry.where}: {len(prompt.token_ids)} tokens, the model takes "
            f"{config.decoder.max_position_embeddings}; shorten it"
        )
    return CalibrationSample(prompt, images, sum(num_tiles), config.tiling)
