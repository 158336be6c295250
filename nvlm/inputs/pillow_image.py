"""A picture that a program holds as Pillow's object."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm.inputs.damage import as_its_own_error
from nvlm.inputs.picture import Picture
from nvlm.inputs.picture_budget import check_num_pixels
from nvlm.inputs.pillow_pages import turn_of
from nvlm.program.errors import UserError

# Pillow reads a file when its pixels are first asked for, and not from two threads at once.
_READING = threading.Lock()


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels [height, width, 3] as they are now, turned upright as the metadata says, with
    transparency on white.

    Raises `UserError` for an empty one, one of too many pixels, of values of no known range, or a
    file that is damaged.
    """
    where = "a Pillow image"
    width, height = image.size
    if width * height == 0:
        raise UserError(f"{where} has {width} x {height} pixels, expected 1 or more")
    check_num_pixels(width, height, where)
    with (
        as_its_own_error(where, "cannot be read", "open its file again, or give its path"),
        _READING,
    ):
        image.load()
        whole = Picture(image, where, on_white=True, turn=turn_of(image)).whole()
    return np.array(whole)
