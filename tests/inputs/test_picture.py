"""A picture that is turned and scaled in parts has the pixels that Pillow gives the whole of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Transpose

from nvlm.inputs import picture as picture_module
from nvlm.inputs import rgb
from nvlm.inputs.picture import Picture
from nvlm.inputs.tiling import tile_image

MODES = ("RGB", "L", "1", "P", "CMYK", "YCbCr", "RGBA", "LA", "PA", "RGBX", "HSV", "LAB", "I;16")
WITH_ALPHA = ("RGBA", "LA", "PA")


@pytest.fixture(params=[(7, 1 << 30), (7, 0), (1 << 20, 0), (1, 0)])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 7 pixels, then a colour at a time, as only a large picture is scaled."""
    strip, copied = request.param
    monkeypatch.setattr(picture_module, "_STRIP_PIXELS", strip)
    monkeypatch.setattr(picture_module, "_COPIED_PIXELS", copied)
    monkeypatch.setattr(rgb, "_PART_PIXELS", strip)


def drawn(mode: str, size: tuple[int, int] = (37, 23)) -> Image.Image:
    values = np.random.default_rng(5)
    colours = Image.fromarray(values.integers(0, 256, (*size[::-1], 3), np.uint8))
    if mode == "I;16":
        grey = values.integers(0, 65536, size[::-1], np.uint16)
        return Image.fromarray(grey)
    if mode == "LAB":
        return Image.frombytes("LAB", size, colours.tobytes())
    if mode in WITH_ALPHA:
        alpha = Image.fromarray(values.integers(0, 256, size[::-1], np.uint8))
        colours.putalpha(alpha)
    return colours.convert(mode if mode != "PA" else "P").convert(mode)


def as_pillow(image: Image.Image, turn: Transpose | None, on_white: bool) -> Image.Image:
    """What Pillow makes of the whole picture at once."""
    image = image if turn is None else image.transpose(turn)
    if image.mode == "I;16":
        scaled = np.rint(np.asarray(image).astype(np.float32) / np.float32(257))
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if on_white and image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A"))
        return paper.convert("RGB")
    return image.convert("RGB")


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("turn", [None, *Transpose])
@pytest.mark.parametrize("mode", MODES)
def test_parts_have_the_pixels_of_the_whole(mode: str, turn: Transpose | None) -> None:
    image = drawn(mode)
    for on_white in (False, True):
        found = Picture(image, "it", on_white=on_white, turn=turn)
        expected = as_pillow(image, turn, on_white)
        assert found.size == expected.size
        assert found.whole().tobytes() == expected.tobytes()
        sizes = ((64, 32), (16, 48), (16, 16), expected.size)
        for size, scaled in zip(sizes, found.scaled(*sizes), strict=True):
            exact = expected.resize(size, Image.Resampling.BICUBIC)
            assert scaled.mode == "RGB"
            assert scaled.tobytes() == exact.tobytes(), (size, on_white)


@pytest.mark.usefixtures("parts")
def test_a_palette_with_a_colour_that_is_see_through_is_laid_on_white_in_parts() -> None:
    image = drawn("P")
    image.info["transparency"] = 3
    expected = as_pillow(image, None, True)
    assert Picture(image, "it", on_white=True).whole().tobytes() == expected.tobytes()


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 500), (500, 3)])
def test_tiles_of_odd_sizes_are_those_of_the_whole(size: tuple[int, int]) -> None:
    image = drawn("RGB", size)
    turned = drawn("RGB", size[::-1]).transpose(Transpose.ROTATE_90)
    for each in (image, turned):
        tiled = tile_image(each, 28, 6)
        columns, rows = tiled.grid
        exact = each.resize((columns * 28, rows * 28), Image.Resampling.BICUBIC)
        first = np.asarray(exact)[:28, :28]
        assert np.array_equal(tiled.tiles[0], first)


def test_a_picture_that_needs_nothing_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it is copied")

    image = drawn("RGB")
    monkeypatch.setattr(Image.Image, "crop", refuse)
    monkeypatch.setattr(Image.Image, "copy", refuse)
    Picture(image, "it").scaled((8, 8), (16, 8))
