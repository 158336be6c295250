"""Picture files to 8-bit RGB, with one-line errors for what is no picture.

What a person gives is read as a person sees it (`PictureRules()`); benchmarks are read as the
reference reads them (`AS_REFERENCE`). Where a picture comes from is the caller's.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm.inputs.pdf_pages import PdfPages
from nvlm.inputs.pillow_pages import PillowPages, check_num_pixels, too_large
from nvlm.inputs.signatures import HEAD_BYTES, is_pdf, remedy
from nvlm.program.errors import UserError
from nvlm.program.file_kinds import is_pipe_or_device

EncodedImage = Path | bytes | NDArray[np.uint8]
"""A file, its bytes, or RGB pixels [height, width, 3]."""

Page = int | Literal["all"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PictureRules:
    """How a picture file becomes pixels."""

    apply_exif: bool = True
    """Turn it upright as its metadata says."""

    on_white: bool = True
    """Lay transparency on white; else drop it and show the colours below."""

    page: Page | None = None
    """Which page or frame, from 1, or all. None: the first, with a warning where there are more."""


AS_REFERENCE = PictureRules(apply_exif=False, on_white=False)
"""The published code's `Image.open(file).convert("RGB")`, which made the published scores."""


def load_image(
    source: EncodedImage, name: str = "the image", rules: PictureRules | None = None
) -> Image.Image:
    """An RGB image: the first page, or the page that `rules` name.

    `name` is what messages call the image when `source` is no file. Raises `UserError` for what
    is missing, no image, truncated, empty, or larger than Pillow's limit (known from the header,
    before any pixel is decoded). Any number of threads may load at once; Pillow's remarks on odd
    metadata and palettes are warnings, which a program switches off once (nvlm/program/process.py).
    """
    return next(load_pages(source, name, rules))


def load_pages(
    source: EncodedImage, name: str = "the image", rules: PictureRules | None = None, most: int = 1
) -> Iterator[Image.Image]:
    """As `load_image`, one after the other all pages that `rules` name.

    Raises `UserError` for more than `most` pages too, before it reads one.
    """
    rules = rules or PictureRules()
    if isinstance(source, np.ndarray):
        yield _from_pixels(source, name)
        return
    where = f"image {source}" if isinstance(source, Path) else name
    head = _head(source, where)
    try:
        yield from _read(source, head, where, rules, most)
    except UserError:
        raise
    except Image.DecompressionBombError:  # a picture within the file
        raise too_large(where) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        what = (str(error).splitlines() or [""])[0].split("<_io.")[0].strip()
        raise UserError(
            f"{where} is not a whole image that Pillow can read "
            f"({what or type(error).__name__}); {remedy(head)}"
        ) from None


def _read(
    source: Path | bytes, head: bytes, where: str, rules: PictureRules, most: int
) -> Iterator[Image.Image]:
    pages: PdfPages | PillowPages
    if is_pdf(head):
        pages = PdfPages(source, where)
    else:
        pages = PillowPages(
            source, head, where, apply_exif=rules.apply_exif, on_white=rules.on_white
        )
    with pages:
        if rules.page is None:
            image = pages.read(None)
            if pages.number > 1:
                log.warning(
                    "%s has %d pages or frames, and the first is read; run.py --page N reads "
                    "another, --page all reads all",
                    where,
                    pages.number,
                )
            yield image
            return
        number = pages.number
        if rules.page == "all":
            if number > most:
                raise UserError(
                    f"{where} has {number} pages or frames, and the request has room for {most}; "
                    "choose one with --page N or build the engine with a larger --max_num_images"
                )
            yield from map(pages.read, range(number))
            return
        if not 1 <= rules.page <= number:
            told = "1 page" if number == 1 else f"{number} pages or frames"
            raise UserError(f"{where} has {told}, expected a page {rules.page}; choose another")
        yield pages.read(rules.page - 1)


def _head(source: Path | bytes, where: str) -> bytes:
    """The first bytes. Raises `UserError` for what is no file with any."""
    if isinstance(source, bytes):
        head = source[:HEAD_BYTES]
    else:
        if is_pipe_or_device(source):
            raise UserError(f"{where} is not a regular file; give a picture file")
        try:
            if source.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with open(source, "rb") as file:
                head = file.read(HEAD_BYTES)
        except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{where} cannot be read: {reason}; give a picture file") from None
    if not head:
        raise UserError(f"{where} is empty (0 bytes); give a whole picture file")
    return head


def _from_pixels(pixels: NDArray[np.uint8], name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise UserError(
            f"{name} is {pixels.dtype} {list(pixels.shape)}, expected uint8 RGB pixels "
            "[height, width, 3]"
        )
    check_num_pixels(pixels.shape[1], pixels.shape[0], name)
    return Image.fromarray(np.ascontiguousarray(pixels))
