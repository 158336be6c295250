"""Pixels of any Pillow image as 8-bit RGB.

Transparency is laid on white, or dropped as the reference's `convert("RGB")` drops it. Grey of more
than 8 bits is scaled by the range of its values. What file they came from is not known here.
"""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm.program.errors import UserError

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")

_RANGES = (1, 255, 4095, 65535)
"""The largest value of a picture: as a fraction, and in 8, 12 and 16 bits."""

_OVERSHOOT = 0.1
"""What resampling adds to floats beyond both ends of their range: a part of the highest."""

_FILLED = 0.5
"""A picture whose values end below this part of a range may be of another one."""

log = logging.getLogger(__name__)


def to_rgb(image: Image.Image, where: str, *, on_white: bool) -> Image.Image:
    """8-bit RGB. `where` names the image in messages.

    Raises `UserError` for values of no known range.
    """
    if image.mode in _WIDE_MODES:
        return _from_wide_grey(image, where, on_white)
    if on_white and image.has_transparency_data:
        return _on_white(image, where)
    return image.convert("RGB")


def _on_white(image: Image.Image, where: str) -> Image.Image:
    rgba = image.convert("RGBA")
    result = Image.new("RGB", image.size, "white")
    result.paste(rgba, mask=rgba.getchannel("A"))
    least_alpha, _ = rgba.getchannel("A").getextrema()
    if least_alpha != 255 and result.getextrema() == ((255, 255),) * 3:
        log.warning(
            "%s is blank: its transparency is laid on white; give it a background of another "
            "colour",
            where,
        )
    return result


def _from_wide_grey(image: Image.Image, where: str, on_white: bool) -> Image.Image:
    values = np.asarray(image)
    grey = _scaled(values, where)
    key = image.info.get("transparency")  # of a greyscale PNG: the value that is see-through
    if on_white and isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _scaled(values: NDArray[np.generic], where: str) -> NDArray[np.uint8]:
    """[height, width] of integers or floats -> uint8, rounded to nearest.

    The divisors of integers are odd multiples, so no value lies exactly halfway.
    """
    lowest, highest = float(values.min()), float(values.max())
    is_float = np.issubdtype(values.dtype, np.floating)
    slack = _OVERSHOOT if is_float else 0.0
    for most in _RANGES if is_float else _RANGES[1:]:
        if lowest >= -slack * highest and highest <= (1 + slack) * most:
            break
    else:  # NaN is refused too
        raise UserError(
            f"{where} holds values from {lowest:g} to {highest:g}, expected a range that starts at "
            f"0 and ends at {', '.join(map(str, _RANGES[:-1]))} or {_RANGES[-1]}; save it in 8 bits"
        )
    usual = 65535 if values.dtype.itemsize == 2 else most
    if 0 < highest < _FILLED * usual:
        kind = "float" if is_float else f"{8 * values.dtype.itemsize}-bit"
        log.warning(
            "%s holds %s values of at most %g: they are read as 0 to %d", where, kind, highest, most
        )
    scaled = values.astype(np.float32) / np.float32(most / 255)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
