"""How much memory reading pictures may take: one number for all threads that read at once.

`nvlm/inputs/picture_cost.py` says what a picture needs before a pixel of it is decoded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from nvlm.program.errors import UserError

DEFAULT_BYTES = 600_000_000
DEFAULT_PIXELS = 178_956_970
"""Where Pillow refuses a picture by default."""

BYTES_PER_PIXEL = 4
"""Pillow keeps colours so."""

_BESIDE = 64 << 20
"""Bytes beside the pixels, where --max_image_pixels raises the budget: rows and the tiles."""

_ROUND_PIXELS = 10_000_000
"""What a message proposes is a multiple of it."""


def most_pixels() -> int | None:
    """Where Pillow calls a picture a decompression bomb: twice where it warns. None: nowhere."""
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def most_bytes() -> int | None:
    """What reading may take: 600 MB, or the pixels of a larger --max_image_pixels. None: any."""
    pixels = most_pixels()
    if pixels is None:
        return None
    return DEFAULT_BYTES if pixels <= DEFAULT_PIXELS else pixels * BYTES_PER_PIXEL + _BESIDE


def check_num_pixels(width: int, height: int, where: str) -> None:
    most = most_pixels()
    if most is not None and width * height > most:
        raise too_many_pixels(where)


def too_many_pixels(where: str) -> UserError:
    return UserError(
        f"{where} has more than {most_pixels():,} pixels; give a smaller one, or start the program "
        "with a larger --max_image_pixels where the memory allows it"
    )


def check_num_bytes(num_bytes: int, where: str) -> None:
    """Raises `UserError` for what no thread may take, even alone."""
    most = most_bytes()
    if most is None or num_bytes <= most:
        return
    pixels = max(num_bytes // BYTES_PER_PIXEL, DEFAULT_PIXELS)
    enough = -(-pixels // _ROUND_PIXELS) * _ROUND_PIXELS
    raise UserError(
        f"{where} takes {_megabytes(num_bytes)} MB of memory to read, expected at most "
        f"{_megabytes(most)}; give a smaller one, or start the program with --max_image_pixels "
        f"{enough} where the memory allows it"
    )


class PictureBudget:
    """Threads that share one hold no more than `most_bytes` together. One that must wait does."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = 0

    @contextmanager
    def held(self, num_bytes: int, where: str) -> Iterator[None]:
        """Waits until `num_bytes` are free and holds them.

        Raises `UserError` for more than there ever are; `where` names the picture.
        """
        check_num_bytes(num_bytes, where)
        with self._changed:
            self._changed.wait_for(lambda: self._fits(num_bytes))
            self._held += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._held -= num_bytes
                self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        most = most_bytes()
        return most is None or self._held == 0 or self._held + num_bytes <= most


def _megabytes(num_bytes: int) -> str:
    return f"{-(-num_bytes // 1_000_000):,}"
