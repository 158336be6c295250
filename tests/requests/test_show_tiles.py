"""run.py --show_tiles: the very pixels of the tiles, in the grid, with the thumbnail beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvlm.inputs.images import load_image
from nvlm.inputs.tiling import TiledImage, tile_image
from runtime.requests.show_tiles import draw_tiles
from tests.support.asking import ask
from tests.support.command import RUN, run_command

Images = Callable[[str], Path]


def find(sheet: Image.Image, tile: np.ndarray) -> tuple[int, int]:
    """(x, y) of the only place where `tile` stands in the sheet."""
    pixels, size = np.asarray(sheet), len(tile)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (size, size))
    candidates = np.argwhere((windows == tile[..., 0]).all((2, 3)))
    places = [
        (int(x), int(y))
        for y, x in candidates
        if np.array_equal(pixels[y : y + size, x : x + size], tile)
    ]
    assert len(places) == 1
    return places[0]


def test_every_tile_stands_in_its_place(tmp_path: Path, engine_dir: Path, images: Images) -> None:
    photo, out = images("landscape_800x450.png"), tmp_path / "tiles.png"
    flags = ("--image", photo, "--prompt", "What is it?", "--show_tiles", out)
    result = run_command(RUN, *ask(engine_dir, *flags))
    assert result.exit_code == 0, result.stderr
    tiled = tile_image(load_image(photo), 56, 6)
    assert tiled.grid == (2, 1)
    left, right, thumbnail = (find(Image.open(out), tile) for tile in tiled.tiles)
    assert left[1] == right[1] == thumbnail[1]
    assert left[0] + 56 <= right[0]
    assert right[0] + 56 <= thumbnail[0]


def test_rows_lie_below_one_another_and_images_too() -> None:
    random = np.random.default_rng(0)
    first, second = (
        TiledImage(grid, random.integers(0, 256, (num_tiles, 28, 28, 3), dtype=np.uint8))
        for grid, num_tiles in (((2, 3), 7), ((1, 1), 1))
    )
    sheet = draw_tiles([first, second])
    places = [find(sheet, tile) for image in (first, second) for tile in image.tiles]
    rows = [places[0:2], places[2:4], places[4:6]]
    assert all(left[1] == right[1] and left[0] < right[0] for left, right in rows)
    assert places[0][1] < places[2][1] < places[4][1] < places[7][1]
    assert places[6][1] == places[0][1]
    assert places[6][0] > places[1][0]


def test_tags_are_written_above_the_tiles() -> None:
    tiles = np.full((3, 112, 112, 3), 128, np.uint8)
    sheet = np.asarray(draw_tiles([TiledImage((2, 1), tiles)]))
    label = sheet[12:32]
    assert (label < 100).any(), "ink"
    halves = [label[:, 12:124], label[:, 136:248]]
    assert not np.array_equal(*halves), "<tile_1> and <tile_2> differ"


@pytest.mark.parametrize("name", ["missing/tiles.png", "tiles.nonsense", "."])
def test_a_file_that_cannot_be_written_is_reported(
    tmp_path: Path, engine_dir: Path, images: Images, name: str
) -> None:
    flags = ("--image", images("landscape_800x450.png"), "--prompt", "x")
    result = run_command(RUN, *ask(engine_dir, *flags, "--show_tiles", tmp_path / name))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--show_tiles" in result.stderr


def test_without_an_image_there_is_nothing_to_show(tmp_path: Path, engine_dir: Path) -> None:
    result = run_command(RUN, *ask(engine_dir, "--prompt", "x", "--show_tiles", tmp_path / "t.png"))
    assert result.exit_code == 2
    assert "--image" in result.stderr
    assert not (tmp_path / "t.png").exists()
