"""Pictures in the forms that people really have: each shows what was drawn, or is refused.

What was drawn is black ink on white paper; every form is compared with it pixel by pixel.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from nvlm.inputs.images import AS_REFERENCE, PictureRules, load_image, load_pages
from nvlm.program.errors import UserError
from nvlm.program.process import set_most_pixels

SIZE = (448, 224)
LOSSY = 4.0
"""The mean difference of an 8-bit value that a lossy format may make at the edges of ink."""


def ink() -> Image.Image:
    """Mode L: 255 where the number is."""
    mask = Image.new("L", SIZE)
    font = ImageFont.load_default(110)
    ImageDraw.Draw(mask).text((224, 112), "4821", 255, font=font, anchor="mm")
    return mask


def paper() -> Image.Image:
    return Image.merge("RGB", [ink().point(lambda value: 255 - value)] * 3)


def grey(dtype: type[np.generic] = np.uint8) -> NDArray[Any]:
    return np.asarray(paper().convert("L")).astype(dtype)


def blank() -> Image.Image:
    return Image.new("RGB", SIZE, "white")


def saved(kind: str, image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(values: NDArray[Any], kind: str = "TIFF") -> bytes:
    return saved(kind, Image.fromarray(values))


def black_and_alpha(mode: str = "RGBA") -> Image.Image:
    """Every pixel is black, only alpha shows the number."""
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    image.putalpha(ink())
    return image.convert(mode)


def two_colours() -> Image.Image:
    """Palette: entry 0 is to be see-through, entry 1 is ink; both are black."""
    image = Image.frombytes("P", SIZE, ink().point(lambda value: int(value > 127)).tobytes())
    image.putpalette([0, 0, 0, 0, 0, 0])
    return image


def turned() -> Image.Image:
    return paper().transpose(Image.Transpose.ROTATE_90)


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags


def lab() -> bytes:
    colourless = np.zeros_like(grey())
    pixels = np.stack([grey(), colourless, colourless], -1)
    return saved("TIFF", Image.frombytes("LAB", SIZE, pixels.tobytes()))


def one_value_see_through() -> bytes:
    """16-bit grey: paper has the ink's colour nearly, and only the key makes it paper."""
    values = np.where(np.asarray(ink()) > 127, 0, 300).astype(np.uint16)
    values[0, 0] = 65535  # the range is 16 bits
    return saved("PNG", Image.fromarray(values), transparency=300)


SHARP = {"see_through_value", "palette_trns", "gif", "one_bit", "exif6_g4"}
"""Without grey edges."""

FORMS: dict[str, Callable[[], bytes]] = {
    "rgba": lambda: saved("PNG", black_and_alpha()),
    "la": lambda: saved("PNG", black_and_alpha("LA")),
    "rgba_webp": lambda: saved("WEBP", black_and_alpha(), lossless=True),
    "rgba_tiff": lambda: saved("TIFF", black_and_alpha()),
    "palette_trns": lambda: saved("PNG", two_colours(), transparency=bytes([0, 255])),
    "gif": lambda: saved("GIF", two_colours(), transparency=0),
    "see_through_value": one_value_see_through,
    "opaque_rgba": lambda: saved("PNG", paper().convert("RGBA")),
    "exif6_jpg": lambda: saved("JPEG", turned(), exif=exif(), quality=95),
    "exif6_png": lambda: saved("PNG", turned(), exif=exif()),
    "exif6_webp": lambda: saved("WEBP", turned(), exif=exif(), lossless=True),
    "exif6_tif": lambda: saved("TIFF", turned(), tiffinfo={0x0112: 6}),
    "exif6_lzw": lambda: saved("TIFF", turned(), tiffinfo={0x0112: 6}, compression="tiff_lzw"),
    "exif6_g4": lambda: saved(
        "TIFF", turned().convert("1", dither=0), tiffinfo={0x0112: 6}, compression="group4"
    ),
    "cmyk_jpg": lambda: saved("JPEG", paper().convert("CMYK"), quality=95),
    "cmyk_tif": lambda: saved("TIFF", paper().convert("CMYK")),
    "grey16": lambda: array(grey(np.uint16) * 257, "PNG"),
    "grey12_in_16": lambda: array(grey(np.uint16) * 16, "PNG"),
    "float01": lambda: array(grey(np.float32) / 255),
    "float01_resampled": lambda: array((grey(np.float32) / 255 - 0.5) * 1.08 + 0.5),
    "float255": lambda: array(grey(np.float32)),
    "float65535": lambda: array(grey(np.float32) * 257),
    "int32_255": lambda: array(grey(np.int32)),
    "int32_65535": lambda: array(grey(np.int32) * 257),
    "lab": lab,
    "one_bit": lambda: saved("TIFF", paper().convert("1", dither=0), compression="group4"),
    "mpo": lambda: saved("MPO", paper(), save_all=True, append_images=[blank()]),
    "jpeg2000": lambda: saved("JPEG2000", paper()),
    "avif": lambda: saved("AVIF", paper()),
}


def difference(image: Image.Image, form: str = "") -> float:
    """The mean difference from what was drawn."""
    expected = paper().convert("1", dither=0).convert("RGB") if form in SHARP else paper()
    assert (image.mode, image.size) == ("RGB", SIZE)
    return float(np.abs(np.asarray(image).astype(float) - np.asarray(expected)).mean())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_picture_shows_what_was_drawn(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if form == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    path = tmp_path / "picture"
    path.write_bytes(FORMS[form]())
    found = load_image(path)
    assert difference(found, form) <= LOSSY
    assert load_image(path.read_bytes()).tobytes() == found.tobytes()
    if form != "grey12_in_16":
        assert caplog.text == ""


def test_the_reference_drops_alpha_and_ignores_exif(tmp_path: Path) -> None:
    """As the published code's `Image.open(file).convert("RGB")`."""
    for name, data in (("alpha", FORMS["rgba"]()), ("exif", FORMS["exif6_png"]())):
        path = tmp_path / name
        path.write_bytes(data)
        expected = Image.open(path).convert("RGB")
        assert load_image(path, rules=AS_REFERENCE).tobytes() == expected.tobytes()
        assert load_image(path).tobytes() != expected.tobytes()


def test_ink_that_white_paper_hides_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    image = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    image.putalpha(ink())
    load_image(saved("PNG", image), "the logo")
    assert "the logo is blank: its transparency is laid on white" in caplog.text
    caplog.clear()
    load_image(saved("PNG", blank().convert("RGBA")))
    assert caplog.text == "", "white and opaque is only white"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FORMS["grey12_in_16"], "16-bit values of at most 4080: they are read as 0 to 4095"),
        (lambda: array(grey(np.uint16) * 64), "16-bit values of at most 16320: they are read as 0"),
        (lambda: array(grey(np.int32) * 4), "32-bit values of at most 1020: they are read as 0 to"),
        (
            lambda: array(grey(np.float32) * (100 / 255)),
            "float values of at most 100: they are read as 0 to 255",
        ),
    ],
    ids=["12_in_16", "14_in_16", "10_in_32", "percent"],
)
def test_values_that_leave_their_range_half_empty_are_reported(
    data: Callable[[], bytes], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    load_image(data(), "the scan")
    assert f"the scan holds {message}" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        np.array([[-1.0, 1.0]], np.float32),
        np.array([[-2.1, 2.6]], np.float32),
        np.array([[0.0, 1e9]], np.float32),
        np.array([[0.0, np.nan]], np.float32),
        np.array([[0.0, np.inf]], np.float32),
        np.array([[-5, 7]], np.int32),
        np.array([[0, 1 << 30]], np.int32),
    ],
    ids=["negative", "normalised", "huge", "nan", "infinite", "negative_int", "huge_int"],
)
def test_values_of_no_known_range_are_refused(values: NDArray[Any]) -> None:
    with pytest.raises(UserError, match=r"^the scan holds values from .* save it in 8 bits$"):
        load_image(array(values), "the scan")


SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "tif": ("TIFF", {}),
    "gif": ("GIF", {"duration": 100}),
    "webp": ("WEBP", {"duration": 100, "lossless": True}),
    "png": ("PNG", {"duration": 100}),
    "pdf": ("PDF", {"resolution": 72}),
    "heic": ("HEIF", {"quality": 95}),
}


def several(kind: str, tmp_path: Path) -> Path:
    """A file of three pages, of which the second has ink."""
    name, options = SEVERAL[kind]
    path = tmp_path / f"scan.{kind}"
    if kind == "heic":
        pillow_heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
        file = pillow_heif.HeifFile()
        for page in (blank(), paper(), blank()):
            file.add_from_pillow(page)
        file.save(path, quality=95)
        return path
    if kind == "pdf":
        pytest.importorskip("pypdfium2", reason="pip install pypdfium2")
    # Two frames that are equal would be merged.
    last = Image.new("RGB", SIZE, (250, 250, 250))
    path.write_bytes(saved(name, blank(), save_all=True, append_images=[paper(), last], **options))
    return path


def has_ink(image: Image.Image) -> bool:
    """Whether what was drawn is there, on a page of any size."""
    return difference(image.resize(SIZE)) < 10


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_several_pages_the_first_is_read_with_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = several(kind, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not has_ink(load_image(path))
    assert f"image {path} has 3 pages or frames, and the first is read" in caplog.text
    assert "--page N" in caplog.text


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_page_or_all_of_them_are_read_by_choice(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = several(kind, tmp_path)
    found = [has_ink(load_image(path, rules=PictureRules(page=page))) for page in (1, 2, 3)]
    assert found == [False, True, False]
    pages = load_pages(path, rules=PictureRules(page="all"), most=3)
    assert [has_ink(page) for page in pages] == [False, True, False]
    assert caplog.text == "", "what was chosen needs no warning"


@pytest.mark.parametrize("kind", SEVERAL)
def test_a_page_that_is_not_there_or_too_many_are_refused(kind: str, tmp_path: Path) -> None:
    path = several(kind, tmp_path)
    with pytest.raises(UserError, match=r"has 3 pages or frames, expected a page 4; choose"):
        load_image(path, rules=PictureRules(page=4))
    with pytest.raises(UserError, match=r"has 3 pages .* room for 2; .*--page N .*max_num_images"):
        next(load_pages(path, rules=PictureRules(page="all"), most=2))


def test_a_picture_of_one_page_has_no_second() -> None:
    with pytest.raises(UserError, match=r"^the image has 1 page, expected a page 2; "):
        load_image(saved("PNG", paper()), rules=PictureRules(page=2))


def test_a_photograph_in_heic_is_read_upright(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pip install pillow-heif")
    path = tmp_path / "photo.heic"
    pillow_heif.from_pillow(paper()).save(path, quality=95)
    assert difference(load_image(path)) <= LOSSY
    assert difference(load_image(path.read_bytes())) <= LOSSY
    with open(path, "wb") as file:
        pillow_heif.encode("RGB", turned().size, turned().tobytes(), file, exif=exif().tobytes())
    assert difference(load_image(path)) <= LOSSY


def test_a_page_of_a_pdf_is_drawn_at_the_size_that_tiles_need(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2", reason="pip install pypdfium2")
    path = tmp_path / "page.pdf"
    paper().save(path)
    image = load_image(path)
    assert image.size == (2000, 1000)
    assert has_ink(image)
    assert load_image(path.read_bytes()).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("package", "head", "message"),
    [
        ("pillow_heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, which needs .*JPEG"),
        ("pillow_heif", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "is HEIC, which needs .*JPEG"),
        ("pypdfium2", b"%PDF-1.7", "is a PDF, which needs .*picture of the page"),
    ],
)
def test_an_optional_package_that_is_missing_is_named(
    package: str, head: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"^the image {message}") as refused:
        load_image(head + bytes(64))
    assert "requirements/pictures.txt" in str(refused.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_photograph_is_read_where_the_limit_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    data = saved("PNG", Image.new("1", (20_000, 10_000)))
    with pytest.raises(UserError, match=r"more than 178,956,970 pixels; .*--max_image_pixels"):
        load_image(data)
    set_most_pixels(200_000_000 - 2)
    with pytest.raises(UserError, match=r"more than 199,999,998 pixels"):
        load_image(data)
    set_most_pixels(200_000_000)
    assert load_image(data).size == (20_000, 10_000)
