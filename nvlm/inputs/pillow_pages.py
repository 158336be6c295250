"""Pages and frames of a picture file as Pillow reads them; HEIC by pillow-heif's plugin
(requirements/pictures.txt), where that is installed."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

from PIL import Image

from nvlm.inputs.rgb import to_rgb
from nvlm.inputs.signatures import is_heic
from nvlm.program.errors import UserError

_ONE_PICTURE = ("MPO", "PSD")
"""Formats whose other frames are previews, depth or layers of the first."""

_NEW_SUBFILE_TYPE = 254  # TIFF 6.0: bit 0 says that an image is a reduced one of another
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


def most_pixels() -> int | None:
    """Where Pillow calls a picture a decompression bomb: twice where it warns. None: nowhere."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def too_large(where: str) -> UserError:
    return UserError(
        f"{where} has more than {most_pixels():,} pixels; give a smaller one, or run.py "
        "--max_image_pixels where the memory allows it"
    )


def check_num_pixels(width: int, height: int, where: str) -> None:
    most = most_pixels()
    if most is not None and width * height > most:
        raise too_large(where)


def upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata says."""
    try:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata does not spoil the picture
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


class PillowPages:
    """An opened picture file; a context that closes it. Pixels are decoded by `read`."""

    def __init__(
        self, source: Path | bytes, head: bytes, where: str, *, apply_exif: bool, on_white: bool
    ) -> None:
        self._where, self._apply_exif, self._on_white = where, apply_exif, on_white
        file = source if isinstance(source, Path) else io.BytesIO(source)
        self._image = _open_heic(file, where) if is_heic(head) else Image.open(file)
        if self._image.format == "EPS":  # Pillow would start Ghostscript on it
            raise ValueError("EPS is a program")
        self._refuse_raw()

    @property
    def number(self) -> int:
        """Of pages or frames. Where the file is damaged after its first, that one counts."""
        if self._image.format in _ONE_PICTURE:
            return 1
        try:
            return int(getattr(self._image, "n_frames", 1))
        except Exception:  # Pillow's decoders raise whatever a damaged file makes them raise
            return 1

    def read(self, index: int | None) -> Image.Image:
        """Page `index` from 0, or the one the file opens with: 8-bit RGB."""
        if index is not None and self.number > 1:
            self._image.seek(index)
        check_num_pixels(*self._image.size, self._where)
        self._image.load()
        image = upright(self._image) if self._apply_exif else self._image
        return to_rgb(image, self._where, on_white=self._on_white)

    def _refuse_raw(self) -> None:
        """A camera's raw file is a TIFF that begins with a preview."""
        tags = getattr(self._image, "tag_v2", {})
        if self._image.format == "TIFF" and int(tags.get(_NEW_SUBFILE_TYPE, 0)) & 1:
            raise UserError(
                f"{self._where} begins with a preview, as a camera's raw files do; export the "
                "picture as JPEG"
            )

    def __enter__(self) -> PillowPages:
        return self

    def __exit__(self, *_: object) -> None:
        self._image.close()


def _open_heic(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError:
        raise UserError(
            f"{where} is HEIC, which needs the package pillow-heif; pip install -r "
            "requirements/pictures.txt, or save it as JPEG"
        ) from None
    image: Image.Image = heif.HeifImageFile(file)
    return image
