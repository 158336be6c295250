"""The pictures of a message are read in the memory that all pictures share."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from frontends.openai.errors import FieldError
from frontends.openai.requests.pictures import read_picture
from nvlm.inputs.images import load_image
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.tiling import TiledImage, tile_image
from nvlm.model.config import TilingConfig

TILING = TilingConfig(image_size=28, max_num_tiles=6)


class Recorded(PictureBudget):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    @contextmanager
    def held(self, num_bytes: int, where: str) -> Iterator[None]:
        self.asked.append(num_bytes)
        with super().held(num_bytes, where):
            yield


def png(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def tiles_of(url: str, detail: str | None, budget: PictureBudget) -> TiledImage:
    source = read_picture(url, detail, "messages[0]").source(None, TILING, 6, budget)
    assert callable(source)
    made = source()
    assert isinstance(made, TiledImage)
    return made


@pytest.mark.parametrize(("detail", "most"), [(None, 6), ("high", 6), ("low", 1)])
def test_a_picture_takes_its_share_and_gives_the_same_tiles(detail: str | None, most: int) -> None:
    file, budget = png(100, 60), Recorded()
    url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
    found = tiles_of(url, detail, budget)
    expected = tile_image(load_image(file), TILING.image_size, most)
    assert found.grid == expected.grid
    assert np.array_equal(found.tiles, expected.tiles)
    assert len(budget.asked) == 1
    assert budget.asked[0] > 100 * 60 * 3


def test_a_picture_that_takes_too_much_is_refused_by_its_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nvlm.inputs.picture_budget.DEFAULT_BYTES", 10_000)
    url = f"data:image/png;base64,{base64.b64encode(png(100, 60)).decode()}"
    with pytest.raises(FieldError, match="the picture takes 1 MB of memory to read"):
        tiles_of(url, None, PictureBudget())
