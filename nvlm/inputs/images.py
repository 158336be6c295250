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
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm.inputs.damage import as_its_own_error
from nvlm.inputs.pdf_pages import PdfPages
from nvlm.inputs.picture import Picture, whole_bytes
from nvlm.inputs.picture_budget import BYTES_PER_PIXEL, PictureBudget, check_num_pixels
from nvlm.inputs.pillow_pages import PillowPages
from nvlm.inputs.signatures import HEAD_BYTES, is_pdf, remedy
from nvlm.program.errors import UserError
from nvlm.program.file_kinds import is_pipe_or_device

EncodedImage = Path | bytes | NDArray[np.uint8]
"""A file, its bytes, or RGB pixels [height, width, 3]."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Page = int | Literal["all"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PictureRules:
    """How a picture file becomes pixels."""

    apply_exif: bool = True  # turn it upright as its metadata says
    on_white: bool = True  # lay transparency on white; else drop it and show the colours below
    # Which page or frame, from 1, or all. None: the first, with a warning where there are more.
    page: Page | None = None

    @property
    def reduces(self) -> bool:
        """Whether a JPEG of very many pixels is decoded at half its size (REDUCED_BEYOND in
        pillow_pages.py); never as the reference reads."""
        return self.apply_exif


AS_REFERENCE = PictureRules(apply_exif=False, on_white=False)
"""The published code's `Image.open(file).convert("RGB")`, which made the published scores."""


class Maker(Protocol[T_co]):
    """Makes something of a decoded picture, which is gone afterwards."""

    def __call__(self, picture: Picture, /) -> T_co: ...

    def num_bytes(self, width: int, height: int) -> int:
        """The memory that it takes meanwhile, beside the picture."""


class _Whole:
    """An RGB image, which is the caller's."""

    def __call__(self, picture: Picture) -> Image.Image:
        return picture.whole()

    def num_bytes(self, width: int, height: int) -> int:
        return whole_bytes(width, height)


def load_image(
    source: EncodedImage, name: str = "the image", rules: PictureRules | None = None
) -> Image.Image:
    """An RGB image: the first page, or the page that `rules` name.

    `name` is what messages call the image when `source` is no file. Raises `UserError` for what
    is missing, no image, truncated, empty, or larger than the limits (known from the header,
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
    return make_of_pages(_Whole(), source, name, rules, most)


def make_of_pages(
    make: Maker[T],
    source: EncodedImage,
    name: str = "the image",
    rules: PictureRules | None = None,
    most: int = 1,
    budget: PictureBudget | None = None,
) -> Iterator[T]:
    """What `make` makes of each page that `rules` name, one after the other.

    `budget` is shared by all threads that read; without one this picture alone counts. Raises
    what `load_pages` raises, whatever goes wrong in `make` too, and `UserError` for a picture that
    takes more memory than the budget has.
    """
    budget = budget or PictureBudget()
    rules = rules or PictureRules()
    if isinstance(source, np.ndarray):
        yield _make_of_pixels(make, source, name, budget)
        return
    where = f"image {source}" if isinstance(source, Path) else name
    head = _head(source, where)
    with (
        as_its_own_error(where, "is not a whole image that Pillow can read", remedy(head)),
        _opened(source, head, where, rules) as pages,
    ):
        for index in _indices(pages, where, rules, most):
            header = pages.go_to(index)
            beside = max(make.num_bytes(*size) for size in header.sizes)
            with budget.held(header.num_bytes + beside, where):
                made = make(pages.read())
            if index is None and pages.number > 1:
                log.warning(
                    "%s has %d pages or frames, and the first is read; run.py --page N reads "
                    "another, --page all reads all",
                    where,
                    pages.number,
                )
            yield made


def _opened(
    source: Path | bytes, head: bytes, where: str, rules: PictureRules
) -> PdfPages | PillowPages:
    if is_pdf(head):
        return PdfPages(source, where)
    return PillowPages(
        source,
        head,
        where,
        apply_exif=rules.apply_exif,
        on_white=rules.on_white,
        reduces=rules.reduces,
    )


def _indices(
    pages: PdfPages | PillowPages, where: str, rules: PictureRules, most: int
) -> Iterator[int | None]:
    """Which pages are read, from 0; None is the one that the file opens with."""
    if rules.page is None:  # a file that is damaged after its first page is not asked for more
        yield None
        return
    number = pages.number
    if rules.page == "all":
        if number > most:
            raise UserError(
                f"{where} has {number} pages or frames, and the request has room for {most}; "
                "choose one with --page N or build the engine with a larger --max_num_images"
            )
        yield from range(number)
        return
    if not 1 <= rules.page <= number:
        found = "1 page" if number == 1 else f"{number} pages or frames"
        raise UserError(f"{where} has {found}, expected a page {rules.page}; choose another")
    yield rules.page - 1


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


def _make_of_pixels(
    make: Maker[T], pixels: NDArray[np.uint8], name: str, budget: PictureBudget
) -> T:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise UserError(
            f"{name} is {pixels.dtype} {list(pixels.shape)}, expected uint8 RGB pixels "
            "[height, width, 3]"
        )
    height, width, _ = pixels.shape
    check_num_pixels(width, height, name)
    num_bytes = width * height * 2 * BYTES_PER_PIXEL + make.num_bytes(width, height)
    with (
        as_its_own_error(name, "is no picture", "give other pixels"),
        budget.held(num_bytes, name),
    ):
        return make(Picture(Image.fromarray(np.ascontiguousarray(pixels)), name))
    raise AssertionError("what is raised in the block is raised by it")
