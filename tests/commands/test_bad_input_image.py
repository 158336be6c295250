"""Images that are none, cut short, empty or bombs."""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, features

from nvlm.inputs.tokenizer import Tokenizer
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest
from runtime.serving.prepare import prepare
from runtime.serving.ticket import Ticket
from tests.support.asking import Images, answered, ask, batch, run_refused
from tests.support.command import RUN, background, one_line_error


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture() -> Image.Image:
    """Incompressible, so that a cut anywhere takes pixels away."""
    noise = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def one_bit_png(width: int, height: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def zero_sized_bmp() -> bytes:
    data = encoded(Image.new("RGB", (4, 4)), "BMP")
    return data[:18] + bytes(8) + data[26:]


CUTS = (1, 10, 30, 60, 200, 1000, 0.25, 0.5, 0.75, 0.99)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpeg": ("JPEG", {}),
    "progressive_jpeg": ("JPEG", {"progressive": True, "quality": 95}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_cut_short_anywhere_is_refused(
    engine_dir: Path, tmp_path: Path, kind: str
) -> None:
    name, options = KINDS[kind]
    whole = encoded(picture(), name, **options)
    path = tmp_path / f"cut.{kind}"
    lines = []
    for number, length in enumerate([int(c if c >= 1 else c * len(whole)) for c in CUTS]):
        (tmp_path / f"{number}.{kind}").write_bytes(whole[:length])
        lines.append({"id": number, "prompt": "hi", "images": [f"{number}.{kind}"]})
    path.write_bytes(whole[: len(whole) // 2])
    flags = ("--image", path, "--prompt", "hi")
    run_refused(engine_dir, tmp_path, *flags, fragments=(path.name, "not a whole image"))
    answers = batch(engine_dir, tmp_path, lines, exit_code=1)
    assert ["not a whole image" in answer.get("error", "") for answer in answers] == [True] * 10


def test_a_png_without_its_end_is_refused_or_has_every_pixel(
    engine_dir: Path, tmp_path: Path
) -> None:
    """Cut between the pixels and the end mark, where decoders may disagree."""
    whole = encoded(picture(), "PNG")
    expected = answered_about(engine_dir, tmp_path, whole)
    for length in (len(whole) - 1, len(whole) - 12, len(whole) - 16):
        found = answered_about(engine_dir, tmp_path, whole[:length])
        assert "error" in found or found["token_ids"] == expected["token_ids"]
    assert "error" in answered_about(engine_dir, tmp_path, whole[:-24])


def answered_about(engine_dir: Path, folder: Path, data: bytes) -> dict[str, Any]:
    """One answer line about one picture."""
    (folder / "picture").write_bytes(data)
    line = {"id": 0, "prompt": "hi", "images": ["picture"]}
    (answer,) = batch(engine_dir, folder, [line], exit_code=None)
    return answer


BAD_IMAGES: list[tuple[str, Callable[[], bytes], tuple[str, ...]]] = [
    ("zero_bytes", lambda: b"", ("0 bytes",)),
    ("text", lambda: b"I am no picture.", ("not a whole image",)),
    ("html", lambda: b"<html>404</html>", ("not a whole image", "it is a web page; download")),
    ("zeros", lambda: bytes(5000), ("not a whole image",)),
    ("video", lambda: b"\0\0\0\x18ftypmp42" + bytes(100), ("not a whole image", "it is a video")),
    ("avif_damaged", lambda: damaged_avif(), ("not a whole image",)),
    (
        "svg",
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        ("not a whole image", "SVG or other XML; export it as PNG"),
    ),
    ("pdf_damaged", lambda: b"%PDF-1.7\n" + bytes(100), ("is a PDF",)),
    ("heic_damaged", lambda: b"\0\0\0\x18ftypheic" + bytes(100), ("image",)),
    ("jpeg_xl", lambda: b"\xff\x0a" + bytes(100), ("not a whole image", "JPEG XL; save it as")),
    ("office", lambda: b"PK\3\4" + bytes(100), ("not a whole image", "export its pages")),
    ("avi", lambda: b"RIFF\0\0\0\0AVI LIST" + bytes(99), ("not a whole image", "it is a video")),
    ("svg_bom", lambda: b"\xef\xbb\xbf<?xml ?><svg/>", ("not a whole image", "drawing in SVG")),
    ("gzip", lambda: b"\x1f\x8b\x08" + bytes(99), ("not a whole image", "gzip; unpack it")),
    ("matroska", lambda: b"\x1aE\xdf\xa3" + bytes(99), ("not a whole image", "it is a video")),
    ("camera_raw", lambda: raw_preview(), ("begins with a preview", "export the picture as JPEG")),
    ("dds", lambda: dds_of_no_format(), ("not a whole image",)),
    ("png_0x0", lambda: one_bit_png(0, 0, b""), ("not a whole image",)),
    ("png_0x5", lambda: one_bit_png(0, 5, bytes(5)), ("not a whole image",)),
    ("ppm_0x0", lambda: b"P6 0 0 255\n", ("not a whole image",)),
    ("bmp_0x0", zero_sized_bmp, ("not a whole image",)),
    ("gif_0x0", lambda: b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\2\2L\1\0;", ("not a whole",)),
    ("png_header_bomb", lambda: one_bit_png(30000, 30000, b""), ("178,956,970", "smaller")),
    (
        "png_real_bomb",
        lambda: one_bit_png(14000, 14000, bytes(1751 * 14000)),
        ("178,956,970", "smaller"),
    ),
    ("ppm_bomb", lambda: b"P6 60000 60000 255\n", ("178,956,970", "smaller")),
    ("ico_with_a_bomb", lambda: ico_of(one_bit_png(30000, 30000, b"")), ("178,956,970",)),
    (
        "text_chunk_bomb",
        lambda: with_text_chunk(encoded(picture(), "PNG"), bytes(8 << 20)),
        ("image",),
    ),
]


def damaged_avif() -> bytes:
    """The place of the pixels is wrong; where Pillow knows no AVIF it is no picture either way."""
    data = encoded(picture(), "AVIF") if features.check("avif") else b"\0\0\0\x18ftypavif"
    return data.replace(b"iloc", b"ilox")


def raw_preview() -> bytes:
    """What DNG and NEF begin with: a small picture that says that it is one of another."""
    return encoded(picture(), "TIFF", tiffinfo={254: 1})


def dds_of_no_format() -> bytes:
    data = bytearray(encoded(picture(), "DDS"))
    data[80:84] = b"\x01\0\0\0"  # pixel format flags: none that exists
    return bytes(data)


def ico_of(png: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


def with_text_chunk(png: bytes, text: bytes) -> bytes:
    """8 MB of text in 8 KB."""
    return png[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text, 1)) + png[33:]


@pytest.mark.parametrize(
    ("make_image", "fragments"), [row[1:] for row in BAD_IMAGES], ids=[row[0] for row in BAD_IMAGES]
)
def test_what_is_no_picture_is_refused(
    engine_dir: Path,
    tmp_path: Path,
    make_image: Callable[[], bytes],
    fragments: tuple[str, ...],
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(make_image())
    flags = ("--image", path, "--prompt", "hi")
    run_refused(engine_dir, tmp_path, *flags, fragments=("picture.png", *fragments))


def test_an_image_that_is_missing_or_a_directory_is_refused(
    engine_dir: Path, tmp_path: Path
) -> None:
    for path, fragment in (
        (tmp_path / "absent.png", "No such file"),
        (tmp_path, "directory"),
        (tmp_path / ("x" * 300), "name too long"),
    ):
        flags = ("--image", path, "--prompt", "hi")
        run_refused(engine_dir, tmp_path, *flags, fragments=(str(path), fragment))


@pytest.mark.process
def test_an_image_that_is_no_regular_file_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    """Reading a pipe waits for ever, reading a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
        flags = ask(engine_dir, "--prompt", "hi", "--image", path)
        result = background(RUN, *flags, log=tmp_path / "log").wait(10)
        one_line_error(result, f"image {path}", "regular file")


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_a_refused_image_is_reported_with_what_was_expected(
    engine_dir: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    line = run_refused(engine_dir, tmp_path, "--image", path, "--prompt", "hi")
    assert re.search(r"\b(expected|give|again)\b", line), f"this says only what was found:\n{line}"


@pytest.mark.parametrize(
    ("num_images", "message"), [(1, "the image is not"), (2, "image 2 of 2 is not")]
)
def test_bytes_that_are_no_image_are_reported_by_their_number(
    engine_dir: Path, images: Images, num_images: int, message: str
) -> None:
    """As a client of Triton sends them; the last is damaged."""
    good = images("pixel_1x1.png").read_bytes()
    sources = (*[good] * (num_images - 1), b"no picture")
    engine = EngineDir.read(engine_dir)
    with pytest.raises(UserError, match=f"^{message}"):
        prepare(
            engine,
            Tokenizer(engine_dir / "tokenizer"),
            Ticket(GenerationRequest.images_first("hi", sources)),
        )


def test_a_bad_image_among_good_ones_is_named(
    engine_dir: Path, images: Images, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no")
    flags = ("--image", images("pixel_1x1.png"), bad, "--prompt", "hi")
    run_refused(engine_dir, tmp_path, *flags, fragments=("bad.png",))


# A tag beside the orientation whose value has another type than the standard gives it.
EXIF_TAGS = {
    "text_for_a_number": struct.pack("<HHI4s", 0x0128, 2, 3, b"ab\0\0"),
    "float_for_an_integer": struct.pack("<HHIf", 0x0100, 11, 1, 1.5),
    "negative_width": struct.pack("<HHIi", 0x0100, 9, 1, -5),
    "unknown_type": struct.pack("<HHI4s", 0x0132, 99, 1, b"abcd"),
    "pointer_outside": struct.pack("<HHII", 0x8769, 4, 1, 0xFFFF),
}


@pytest.mark.parametrize("kind", EXIF_TAGS)
def test_odd_exif_does_not_spoil_a_whole_picture(
    engine_dir: Path, tmp_path: Path, kind: str
) -> None:
    """Cameras and editors write all kinds of tags; only the orientation is ours to read."""
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    entries = struct.pack("<H", 2) + orientation + EXIF_TAGS[kind]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4)
    path = tmp_path / "camera.jpg"
    path.write_bytes(encoded(picture().resize((300, 100)), "JPEG", exif=exif))
    columns, rows = answered(engine_dir, "--image", path, "--prompt", "hi")["grids"][0]
    assert rows > columns, "orientation 6 turns a wide picture into a tall one"
