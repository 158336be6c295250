"""Image files to 8-bit RGB, with one-line errors for what is not an image.

Semantics: EXIF orientation applied on request; 16-bit grey scaled by 1/257 (Pillow would clip it);
alpha dropped as the reference's `convert("RGB")` does; of an animation the first frame counts.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nvlm.errors import UserError

MAX_IMAGE_PIXELS = 178_956_970
"""Where Pillow itself calls a picture a decompression bomb: 2 x 1/4 GiB of RGB, about 13,377^2."""

_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def load_image(
    source: Path | bytes, name: str = "image", *, apply_exif: bool = True
) -> Image.Image:
    """An RGB image from a file or its bytes.

    `name` stands for the image in messages when `source` is bytes. Raises `UserError` for what is
    missing, no image, truncated, empty, or larger than `MAX_IMAGE_PIXELS` (known from the header,
    before any pixel is decoded).
    """
    where = str(source) if isinstance(source, Path) else name
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
    except (OSError, ValueError) as error:  # ValueError: a NUL or a lone surrogate in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"image {where} cannot be read: {reason}") from None
    if not data:
        raise UserError(f"image {where} is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if apply_exif else image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"image {where} has more than {MAX_IMAGE_PIXELS:,} pixels; make it smaller"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        # Pillow raises all of these for damaged files, SyntaxError for broken PNG chunks.
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = what.replace(f" {io.BytesIO.__name__}", "").split("<_io.")[0].strip()
        raise UserError(
            f"image {where} is not a whole image that Pillow can read ({what})"
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any Pillow image."""
    if image.mode in _SIXTEEN_BIT_MODES:
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        # Round half up; 257 is odd, so value / 257 never lies exactly halfway.
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    with warnings.catch_warnings():
        # Pillow advises RGBA for palettes with transparency; the reference drops it.
        warnings.filterwarnings("ignore", "Palette images with Transparency")
        return image.convert("RGB")
