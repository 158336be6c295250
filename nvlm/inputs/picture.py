"""A decoded picture of any mode, turned and scaled without a second copy of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from PIL import Image
from PIL.Image import Transpose

from nvlm.inputs.picture_budget import BYTES_PER_PIXEL
from nvlm.inputs.rgb import rgb_of

_STRIP_PIXELS = 1 << 17
"""Half a megabyte, which a core's cache holds: a photograph of 12 megapixels is turned in a third
of the time that strips of a million pixels take. Pillow turns and copies under Python's lock,
which other threads get between two strips."""

_COPIED_PIXELS = 1 << 24
"""Up to so many a picture is copied as RGB and upright, and then scaled, which is faster."""

_SWAPPED = (
    Transpose.TRANSPOSE,
    Transpose.TRANSVERSE,
    Transpose.ROTATE_90,
    Transpose.ROTATE_270,
)
"""Rows become columns."""

_FROM_THE_END = (
    Transpose.ROTATE_180,
    Transpose.FLIP_TOP_BOTTOM,
    Transpose.ROTATE_90,
    Transpose.TRANSVERSE,
)
"""The first row of the result is the last of what is stored: row or column."""


@dataclass(frozen=True, slots=True)
class PageHeader:
    """What is known of a page before it is decoded."""

    sizes: tuple[tuple[int, int], ...]  # width and height: several where it may yet be turned
    num_bytes: int  # what decoding takes


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image of any mode, and what makes it 8-bit RGB and upright."""

    image: Image.Image  # as Pillow decoded it, before any turn
    where: str  # what messages call it
    on_white: bool = False  # see-through pixels become white instead of what is below them
    turn: Transpose | None = None  # what makes it upright, from EXIF; None: it is
    _rgb: Callable[[Image.Image], Image.Image] = field(init=False)  # makes 8-bit RGB of rows

    def __post_init__(self) -> None:
        rgb = rgb_of(self.image, self.where, on_white=self.on_white)
        object.__setattr__(self, "_rgb", rgb)

    @property
    def is_opaque(self) -> bool:
        return not (self.on_white and self.image.has_transparency_data)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright."""
        width, height = self.image.size
        return (height, width) if self.turn in _SWAPPED else (width, height)

    def strips(self) -> Iterator[tuple[int, Image.Image]]:
        """(first row, RGB rows) from the top, about `_STRIP_PIXELS` each."""
        width, height = self.size
        rows = max(1, _STRIP_PIXELS // width)
        for top in range(0, height, rows):
            part = self._rgb(self.image.crop(self._box(top, min(top + rows, height))))
            yield top, part if self.turn is None else part.transpose(self.turn)

    def whole(self) -> Image.Image:
        """An RGB image of its own."""
        result = Image.new("RGB", self.size)
        for top, strip in self.strips():
            result.paste(strip, (0, top))
        return result

    def scaled(self, *sizes: tuple[int, int]) -> list[Image.Image]:
        """The whole of it, stretched to each size, RGB: what Pillow makes of `whole`.

        A large picture that is not RGB and upright as it is stored is scaled a colour at a time,
        so that a fourth of its pixels is copied.
        """
        if self.image.mode == "RGB" and self.turn is None and self.is_opaque:
            return [_stretched(self.image, size) for size in sizes]
        width, height = self.size
        if width * height <= _COPIED_PIXELS:
            whole = self.whole()
            return [_stretched(whole, size) for size in sizes]
        colours: list[list[Image.Image]] = []
        for channel in range(3):
            values = Image.new("L", self.size)
            for top, strip in self.strips():
                values.paste(strip.getchannel(channel), (0, top))
            colours.append([_stretched(values, size) for size in sizes])
        return [Image.merge("RGB", scaled) for scaled in zip(*colours, strict=True)]

    def _box(self, top: int, bottom: int) -> tuple[int, int, int, int]:
        """What is stored of the upright rows `top` to `bottom`."""
        width, height = self.image.size
        if self.turn in _FROM_THE_END:
            num_rows = self.size[1]
            top, bottom = num_rows - bottom, num_rows - top
        return (top, 0, bottom, height) if self.turn in _SWAPPED else (0, top, width, bottom)


def _stretched(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.BICUBIC)


def whole_bytes(width: int, height: int) -> int:
    """What `whole` takes beside its result and the picture: rows as stored, RGB and turned."""
    return min(height * width, max(_STRIP_PIXELS, width)) * 4 * BYTES_PER_PIXEL


def scaling_bytes(width: int, height: int, *sizes: tuple[int, int]) -> int:
    """What `scaled` takes beside the picture and what it returns. Pillow scales in two passes,
    and keeps what is between them."""
    is_copied = width * height <= _COPIED_PIXELS
    copied = width * height * (BYTES_PER_PIXEL if is_copied else 1)
    between = max(max(size[0] * height, size[1] * width) for size in sizes)
    return whole_bytes(width, height) + copied + BYTES_PER_PIXEL * between
