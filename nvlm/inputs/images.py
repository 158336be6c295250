"""Image files to 8-bit RGB, with one-line errors for what is not an image.

Semantics: EXIF orientation applied on request; 16-bit grey scaled by 1/257 (Pillow would clip it);
alpha dropped as the reference's `convert("RGB")` does; of an animation the first frame counts.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nvlm.program.errors import UserError
from nvlm.program.file_kinds import is_pipe_or_device

MAX_IMAGE_PIXELS = 178_956_970
"""Where Pillow itself calls a picture a decompression bomb: 2 x 1/4 GiB of RGB, about 13,377^2."""

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")

_ORIENTATION_TAG = 0x0112
# EXIF 2.32, tag Orientation: what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Path | bytes | NDArray[np.uint8], name: str = "the image", *, apply_exif: bool = True
) -> Image.Image:
    """An RGB image from a file, its bytes, or pixels [height, width, 3].

    `name` is what messages call the image when `source` is no file. Raises `UserError` for what
    is missing, no image, truncated, empty, or larger than `MAX_IMAGE_PIXELS` (known from the
    header, before any pixel is decoded). Any number of threads may load at once; Pillow's remarks
    on odd metadata and palettes are warnings, which a program switches off once
    (nvlm/program/process.py).
    """
    if isinstance(source, np.ndarray):
        return _from_pixels(source, name)
    where = f"image {source}" if isinstance(source, Path) else name
    if isinstance(source, Path) and is_pipe_or_device(source):
        raise UserError(f"{where} is not a regular file; give a picture file")
    try:
        if isinstance(source, Path) and source.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        size = source.stat().st_size if isinstance(source, Path) else len(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be read: {reason}; give a picture file") from None
    if size == 0:
        raise UserError(f"{where} is empty (0 bytes); give a whole picture file")
    try:
        return _decode(source, apply_exif)
    except Image.DecompressionBombError:
        raise _too_large(where) from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
        what = (str(error).splitlines() or [""])[0].split("<_io.")[0].strip()
        raise UserError(
            f"{where} is not a whole image that Pillow can read "
            f"({what or type(error).__name__}); expected a JPEG, PNG or other picture file"
        ) from None


def _too_large(where: str) -> UserError:
    return UserError(f"{where} has more than {MAX_IMAGE_PIXELS:,} pixels; give a smaller one")


def _from_pixels(pixels: NDArray[np.uint8], name: str) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise UserError(
            f"{name} is {pixels.dtype} {list(pixels.shape)}, expected uint8 RGB pixels "
            "[height, width, 3]"
        )
    if pixels.shape[0] * pixels.shape[1] > MAX_IMAGE_PIXELS:
        raise _too_large(name)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _decode(source: Path | bytes, apply_exif: bool) -> Image.Image:
    with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
        if image.format == "EPS":  # Pillow would start Ghostscript on it
            raise ValueError("EPS is a program")
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        orientation = _orientation(image) if apply_exif else 1
        upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
        return to_rgb(upright)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata does not spoil the picture
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any Pillow image."""
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int32), 0, 65535)
        # Round half up; 257 is odd, so value / 257 never lies exactly halfway.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
