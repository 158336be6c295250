"""Pixels of any Pillow image as 8-bit RGB.

Transparency is laid on white, or dropped as the reference's `convert("RGB")` drops it. Grey of more
than 8 bits is scaled by the range of its values. What file they came from is not known here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm.program.errors import UserError

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

_RANGES = (1, 255, 4095, 65535)
"""The largest value of a picture: as a fraction, and in 8, 12 and 16 bits."""

_OVERSHOOT = 0.1
"""What resampling adds to floats beyond both ends of their range: a part of the highest."""

_PART_PIXELS = 1 << 20
"""How many pixels are looked at at once, so that no second copy of the whole exists."""

_FILLED = 0.5
"""A picture whose values end below this part of a range may be of another one."""

log = logging.getLogger(__name__)


def rgb_of(
    image: Image.Image, where: str, *, on_white: bool
) -> Callable[[Image.Image], Image.Image]:
    """What turns any part of `image`, cut from it, into 8-bit RGB as it is in the whole.

    `where` names the image in messages. Raises `UserError` for values of no known range.
    """
    if image.mode in _WIDE_MODES:
        key = image.info.get("transparency")  # a greyscale PNG's see-through value
        key = key if on_white and isinstance(key, int) else None
        return partial(_from_wide_grey, most=_most(image, where), key=key)
    if on_white and image.has_transparency_data:
        _warn_of_blank(image, where)
        return _on_white
    return _converted


def _converted(part: Image.Image) -> Image.Image:
    return part if part.mode == "RGB" else part.convert("RGB")


def _on_white(part: Image.Image) -> Image.Image:
    rgba = part.convert("RGBA")
    result = Image.new("RGB", part.size, "white")
    result.paste(rgba, mask=rgba.getchannel("A"))
    return result


def _from_wide_grey(part: Image.Image, most: int, key: int | None) -> Image.Image:
    values = np.asarray(part)
    grey = _scaled(values, most)
    if key is not None:
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _parts(image: Image.Image) -> Iterator[Image.Image]:
    width, height = image.size
    rows = max(1, _PART_PIXELS // width)
    for top in range(0, height, rows):
        yield image.crop((0, top, width, min(top + rows, height)))


def _warn_of_blank(image: Image.Image, where: str) -> None:
    """Says so where transparency leaves nothing but white. Ends at the first part with ink."""
    is_opaque = True
    for part in _parts(image):
        if _on_white(part).getextrema() != ((255, 255),) * 3:
            return
        lowest, _ = part.convert("RGBA").getchannel("A").getextrema()
        is_opaque = is_opaque and lowest == 255
    if not is_opaque:
        log.warning(
            "%s is blank: its transparency is laid on white; give it a background of another "
            "colour",
            where,
        )


def _most(image: Image.Image, where: str) -> int:
    """The end of the range of wide grey."""
    ends = [(values.min(), values.max()) for values in map(np.asarray, _parts(image))]
    lowest, highest = float(np.min(ends)), float(np.max(ends))  # NaN stays NaN
    dtype = np.asarray(image.crop((0, 0, 1, 1))).dtype
    is_float = np.issubdtype(dtype, np.floating)
    slack = _OVERSHOOT if is_float else 0.0
    for most in _RANGES if is_float else _RANGES[1:]:
        if lowest >= -slack * highest and highest <= (1 + slack) * most:
            break
    else:  # NaN is refused too
        raise UserError(
            f"{where} holds values from {lowest:g} to {highest:g}, expected a range that starts at "
            f"0 and ends at {', '.join(map(str, _RANGES[:-1]))} or {_RANGES[-1]}; save it in 8 bits"
        )
    usual = 65535 if dtype.itemsize == 2 else most
    if 0 < highest < _FILLED * usual:
        kind = "float" if is_float else f"{8 * dtype.itemsize}-bit"
        log.warning(
            "%s holds %s values of at most %g: they are read as 0 to %d", where, kind, highest, most
        )
    return most


def _scaled(values: NDArray[np.generic], most: int) -> NDArray[np.uint8]:
    """[height, width] of integers or floats -> uint8, rounded to nearest.

    The divisors of integers are odd multiples, so no value lies exactly halfway.
    """
    scaled = values.astype(np.float32) / np.float32(most / 255)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
