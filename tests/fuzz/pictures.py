"""Pictures in every form that Pillow writes, damaged; PNG chunk by chunk, with right checksums."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from nvlm.inputs.images import AS_REFERENCE, PictureRules, make_of_pages
from nvlm.inputs.tiling import Tiler
from tests.fuzz.kind import Opened
from tests.fuzz.mutations import EXTREMES, Draw, change_bytes, mutated_bytes

_TILER = Tiler(56, 6)
_SIGNATURE = 8
_RULES = (PictureRules(), AS_REFERENCE, PictureRules(page="all"), PictureRules(page=2))


def open_pictures(_: Path) -> Opened:
    seeds = _seeds()
    pngs = [seed for seed in seeds if seed.startswith(b"\x89PNG")]
    data = st.one_of(mutated_bytes(seeds), mutated_bytes(seeds), mutated_png(pngs))
    return Opened(st.tuples(data, st.sampled_from(_RULES)), _read)


def _read(case: tuple[bytes, PictureRules]) -> None:
    data, rules = case
    for tiled in make_of_pages(_TILER, data, "the picture", rules, most=8):
        assert 1 <= tiled.num_tiles <= 7
        assert tiled.tiles.shape[1:] == (56, 56, 3)


@st.composite
def mutated_png(draw: Draw, seeds: list[bytes]) -> bytes:
    seed = draw(st.sampled_from(seeds))
    chunks = _chunks(seed)
    for _ in range(draw(st.integers(1, 3))):
        index = draw(st.integers(0, len(chunks) - 1))
        name, data = chunks[index]
        match draw(st.sampled_from(("data", "size", "twice", "drop", "move"))):
            case "size":
                fields = [draw(st.sampled_from(EXTREMES)) for _ in range(2)]
                header = bytearray(chunks[0][1])
                header[: 4 * len(fields)] = struct.pack(">2I", *fields)
                chunks[0] = (chunks[0][0], bytes(header))
            case "twice":
                chunks.insert(index, (name, data))
            case "drop" if len(chunks) > 1:
                del chunks[index]
            case "move":
                chunks.append(chunks.pop(index))
            case _:
                changed = bytearray(data)
                change_bytes(draw, changed, [data])
                chunks[index] = (name, bytes(changed))
    written = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )
    return seed[:_SIGNATURE] + written


def _chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], _SIGNATURE
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        found.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def _seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    colours = Image.fromarray(pixels)
    clear = colours.copy()
    clear.putalpha(Image.fromarray(pixels[..., 0]))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    other = colours.transpose(Image.Transpose.ROTATE_180)
    several: dict[str, Any] = {"save_all": True, "append_images": [other, colours]}
    written: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colours, "PNG", {}),
        (clear, "PNG", {}),
        (colours.convert("P"), "PNG", {"transparency": 3}),
        (colours.convert("1"), "PNG", {}),
        (grey, "PNG", {}),
        (colours, "PNG", {**several, "duration": 9}),
        (colours, "JPEG", {"exif": exif}),
        (colours, "JPEG", {"progressive": True, "subsampling": 0}),
        (colours.convert("CMYK"), "JPEG", {}),
        (colours.convert("L"), "JPEG", {}),
        (colours, "MPO", several),
        (colours, "WEBP", {"lossless": True}),
        (clear, "WEBP", {"exif": exif}),
        (colours, "WEBP", {**several, "duration": 9}),
        (colours.convert("P"), "GIF", {}),
        (colours, "GIF", {**several, "duration": 9}),
        *[
            (colours, "TIFF", {"compression": name})
            for name in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
        ],
        (colours.convert("1"), "TIFF", {"compression": "group4", "tiffinfo": {0x0112: 6}}),
        (Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF", {}),
        (grey, "TIFF", {}),
        (colours, "TIFF", several),
        *[(colours, name, {}) for name in ("BMP", "TGA", "PCX", "PPM", "SGI", "ICO", "DDS", "IM")],
        (colours.convert("1"), "XBM", {}),
        (colours, "JPEG2000", {}),
        (clear, "ICNS", {}),
        (colours, "PDF", {}),
        (colours, "AVIF", {"speed": 10}),
    ]
    seeds = []
    for image, kind, options in written:
        file = io.BytesIO()
        try:
            more = [each.copy() for each in options.get("append_images", ())]
            # Copies, for a writer leaves its settings in the image.
            image.copy().save(file, kind, **{**options, "append_images": more})
        except (KeyError, OSError):  # this Pillow was built without it
            continue
        seeds.append(file.getvalue())
    return seeds
