"""What decoding a picture takes in memory, by its header: pixels, and what the decoder
keeps beside them. tests/inputs/test_picture_budget.py measures each format against it."""

from __future__ import annotations

from typing import Any

from PIL import Image

_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
"""Bytes a pixel of Pillow's modes; 4 in all others."""

_BESIDE = {
    "JPEG": 0,
    "MPO": 0,
    "PNG": 0,
    "BMP": 0,
    "DIB": 0,
    "TGA": 0,
    "PCX": 0,
    "GIF": 0,
    "TIFF": 0,  # but for its strips
    "SGI": 2,
    "WEBP": 15,  # libwebp's canvases of an animation, which Pillow asks for always
    "AVIF": 12,
    "HEIF": 12,
}
"""Bytes a pixel that a decoder takes beside the stored ones, in the worst of its forms."""

_UNKNOWN = 8

_FRAME_BESIDE = {"PNG": 8, "GIF": 12}
"""More for a frame after the first: what was below it, and what it is laid on."""

_JPEG_2000_BAND = 6  # OpenJPEG's integers of 4 bytes, and their rows
_COEFFICIENT = 2  # bytes a coefficient of a progressive JPEG; libjpeg keeps all
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323  # TIFF 6.0
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _ORIENTATION = 258, 277, 274


def decoding_bytes(image: Image.Image, index: int = 0) -> int:
    """image: opened and not yet decoded, at its frame `index`."""
    width, height = image.size
    if image.format == "ICO":
        image, (width, height) = _icon(image)
    stored = width * height * 4 if index else stored_bytes(image)
    if _turned_by_pillow(image):
        stored *= 2
    return stored + int(width * height * _beside(image, index)) + _of_strips(image)


def stored_bytes(image: Image.Image) -> int:
    """What its pixels take once they are decoded."""
    return image.size[0] * image.size[1] * _STORED.get(image.mode, 4)


def _beside(image: Image.Image, index: int) -> float:
    """Bytes a pixel."""
    kind = image.format or ""
    if kind == "JPEG2000":
        return _JPEG_2000_BAND * max(3, len(image.getbands()))
    if kind in ("JPEG", "MPO") and image.info.get("progressive"):
        return _coefficients(image)
    beside = _BESIDE.get(kind, 0 if _is_raw(image) else _UNKNOWN)
    return beside + (_FRAME_BESIDE.get(kind, 0) if index else 0)


def _turned_by_pillow(image: Image.Image) -> bool:
    """Pillow turns a TIFF upright as it decodes it, into a copy."""
    tags = getattr(image, "tag_v2", None)
    return image.format == "TIFF" and tags is not None and tags.get(_ORIENTATION, 1) != 1


def _is_raw(image: Image.Image) -> bool:
    """Whether the pixels lie in the file as they are, and are read row by row."""
    tiles: list[Any] = getattr(image, "tile", [])
    return bool(tiles) and all(tile[0] == "raw" for tile in tiles)


def _coefficients(image: Image.Image) -> float:
    """Bytes a pixel of a JPEG: those of each component, as far as it is sampled."""
    layers: list[tuple[int, ...]] = getattr(image, "layer", [])  # (id, horizontal, vertical, table)
    sampled = [layer[1] * layer[2] for layer in layers]
    if not sampled:
        return float(_COEFFICIENT * len(image.getbands()))
    return _COEFFICIENT * sum(sampled) / max(sampled)


def _of_strips(image: Image.Image) -> int:
    """A TIFF's strip or tile as it was read, and as it was packed."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None or _is_raw(image):
        return 0
    width, height = image.size
    if _TILE_WIDTH in tags:
        pixels = _number(tags, _TILE_WIDTH, width) * _number(tags, _TILE_LENGTH, height)
    else:
        pixels = width * min(_number(tags, _ROWS_PER_STRIP, height), height)
    bits = tags.get(_BITS_PER_SAMPLE, (8,))
    bits = max(bits) if isinstance(bits, tuple) else bits
    bytes_per_pixel = max(4, int(bits) * _number(tags, _SAMPLES_PER_PIXEL, 1) // 8)
    return 2 * pixels * bytes_per_pixel


def _number(tags: Any, tag: int, default: int) -> int:
    return max(1, int(tags.get(tag, default)))


def _icon(image: Image.Image) -> tuple[Image.Image, tuple[int, int]]:
    """The picture within an icon, whose own size counts."""
    icon: Any = getattr(image, "ico", None)
    if icon is None:
        return image, image.size
    inner: Image.Image = icon.frame(icon.getentryindex(image.size))
    return inner, inner.size
