"""Pages and frames of a picture file as Pillow reads them; HEIC by pillow-heif's plugin
(requirements/pictures.txt), where that is installed."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

from PIL import Image

from nvlm.inputs.picture import PageHeader, Picture
from nvlm.inputs.picture_budget import check_num_pixels
from nvlm.inputs.picture_cost import decoding_bytes, stored_bytes
from nvlm.inputs.signatures import is_heic
from nvlm.program.errors import UserError

_ONE_PICTURE = ("MPO", "PSD")
"""Formats whose other frames are previews, depth or layers of the first."""

REDUCED_BEYOND = 100_000_000
"""Pixels: a JPEG of more is decoded at half its width and height, unless it is a benchmark's. Its
sides have 65,535 pixels at most, so half of them are still more than tiles show."""

_REDUCIBLE = ("JPEG", "MPO")

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


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns it upright, as its metadata says."""
    try:
        return _UPRIGHT.get(int(image.getexif().get(_ORIENTATION_TAG, 1)))
    except Exception:  # damaged metadata does not spoil the picture
        return None


class PillowPages:
    """An opened picture file; a context that closes it. Pixels are decoded by `read`."""

    def __init__(
        self,
        source: Path | bytes,
        head: bytes,
        where: str,
        *,
        apply_exif: bool,
        on_white: bool,
        reduces: bool,
    ) -> None:
        self._where, self._apply_exif, self._on_white = where, apply_exif, on_white
        self._reduces = reduces
        file = source if isinstance(source, Path) else io.BytesIO(source)
        self._image = _open_heic(file, where) if is_heic(head) else Image.open(file)
        if self._image.format == "EPS":  # Pillow would start Ghostscript on it
            raise ValueError("EPS is a program")
        self._refuse_raw()

    @property
    def number(self) -> int:
        """The number of pages or frames; 1 where the file is damaged after its first."""
        if self._image.format in _ONE_PICTURE:
            return 1
        try:
            return int(getattr(self._image, "n_frames", 1))
        except Exception:  # Pillow's decoders raise whatever a damaged file makes them raise
            return 1

    def go_to(self, index: int | None) -> PageHeader:
        """What is known of page `index` from 0, or of the one the file opens with, before a pixel
        is decoded. Raises `UserError` for one of too many pixels."""
        if index is not None and self.number > 1:
            self._image.seek(index)
        width, height = self._image.size
        check_num_pixels(width, height, self._where)
        num_bytes = decoding_bytes(self._image, index or 0)
        if self._reduces and self._image.format in _REDUCIBLE and width * height > REDUCED_BEYOND:
            num_bytes -= stored_bytes(self._image)
            self._image.draft(None, (width // 2, height // 2))
            num_bytes += stored_bytes(self._image)
        width, height = self._image.size
        # A PNG may say only after its pixels how it is turned.
        sizes = ((width, height), (height, width)) if self._apply_exif else ((width, height),)
        return PageHeader(sizes, num_bytes)

    def read(self) -> Picture:
        """Decodes the page that `go_to` found."""
        self._image.load()
        turn = turn_of(self._image) if self._apply_exif else None
        return Picture(self._image, self._where, on_white=self._on_white, turn=turn)

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
