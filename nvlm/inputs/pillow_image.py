"""A picture that a program holds as Pillow's object."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nvlm.inputs.images import MAX_IMAGE_PIXELS, to_rgb
from nvlm.program.errors import UserError

# Pillow reads a file when its pixels are first asked for, and not from two threads at once.
_READING = threading.Lock()


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels [height, width, 3] as they are now, turned upright as the metadata says.

    Raises `UserError` for an empty one, one of too many pixels, or a file that is damaged.
    """
    width, height = image.size
    if not 0 < width * height <= MAX_IMAGE_PIXELS:
        raise UserError(
            f"a Pillow image has {width} x {height} pixels, expected 1 to {MAX_IMAGE_PIXELS:,}; "
            "resize it"
        )
    try:
        with _READING:
            return np.array(to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        raise UserError(
            f"a Pillow image cannot be read ({error}); open its file again, or give its path"
        ) from None
