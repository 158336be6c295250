"""Tiling against goldens calculated apart from it and against the published algorithm."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from nvlm.inputs.images import PictureRules, load_image
from nvlm.inputs.tiling import candidate_grids, choose_grid, normalize, tile_image
from tests.reference import tiling as reference

DATA = Path(__file__).parents[1] / "data"
GRIDS = json.loads((DATA / "grid_goldens.json").read_text())
TILES = json.loads((DATA / "tiling_goldens.json").read_text())


def test_six_tiles_give_14_grids_and_twelve_give_35() -> None:
    assert len(candidate_grids(6)) == len(set(candidate_grids(6))) == 14
    assert len(candidate_grids(12)) == 35


def test_every_golden_size_takes_its_golden_grid() -> None:
    wrong = [
        golden
        for golden in GRIDS["goldens"]
        if choose_grid(golden["width"], golden["height"], 448, golden["max_num_tiles"])
        != (golden["columns"], golden["rows"])
    ]
    assert len(GRIDS["goldens"]) > 400
    assert wrong == []


def test_where_floats_see_no_tie_the_published_code_is_followed() -> None:
    for golden in GRIDS["float_decides"]:
        grid = choose_grid(golden["width"], golden["height"], 448, golden["max_num_tiles"])
        assert grid == tuple(golden["float64"]), golden


def test_a_sweep_of_sizes_takes_the_grids_of_the_published_algorithm() -> None:
    sizes = [1, 2, 99, 100, 333, 448, 449, 633, 634, 896, 1000, 1344, 3000]
    for width in sizes:
        for height in sizes:
            for limit in (1, 2, 6, 12):
                expected = reference.grid_float(width, height, limit)
                assert choose_grid(width, height, 448, limit) == expected, (width, height, limit)


@pytest.mark.parametrize(
    "golden",
    TILES["goldens"],
    ids=lambda golden: f"{golden['file']}-max{golden['max_num_tiles']}-exif{golden['exif']:d}",
)
def test_pixels_of_every_kind_of_image_equal_the_golden(golden: dict[str, Any]) -> None:
    rules = PictureRules(apply_exif=golden["exif"], on_white=False)
    image = load_image(DATA / "images" / golden["file"], rules=rules)
    assert list(image.size) == golden["size"]
    tiled = tile_image(image, 448, golden["max_num_tiles"])
    assert list(tiled.grid) == golden["grid"]
    assert tiled.num_tiles == golden["num_tiles"]
    normalized = normalize(tiled.tiles).to(torch.float64)
    for name, values in (
        ("means", normalized.mean((2, 3))),
        ("stds", normalized.std((2, 3), correction=0)),
    ):
        assert np.allclose(values.numpy(), np.array(golden[name]), atol=0.02, rtol=0), name
    if PIL.__version__ == TILES["versions"]["pillow"]:
        assert hashlib.sha256(tiled.tiles.tobytes()).hexdigest() == golden["sha256"]


@pytest.mark.parametrize("size", [(800, 450), (400, 1000), (300, 300), (1500, 290)])
def test_normalised_tiles_equal_the_readme_of_the_model(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1] // 10, size[0] // 10, 3), np.uint8)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
    expected = reference.tiles(image, 6, 112)
    found = normalize(tile_image(image, 112, 6).tiles).numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6


def test_tiles_stand_row_by_row_with_the_thumbnail_last() -> None:
    """Six plain colours in a 3 x 2 picture; the thumbnail alone is mixed."""
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(np.kron(colours, np.ones((448, 448), np.uint8))).convert("RGB")
    tiled = tile_image(image, 448, 6)
    assert tiled.grid == (3, 2)
    centres = tiled.tiles[:6, 224, 224, 0]
    assert centres.tolist() == [0, 40, 80, 120, 160, 200]
    assert len(np.unique(tiled.tiles[6])) > 6


def test_the_cache_key_is_equal_exactly_for_equal_pixels() -> None:
    image = load_image(DATA / "images" / "landscape_800x450.png")
    other = image.copy()
    other.putpixel((5, 5), (1, 2, 3))
    keys = [tile_image(i, 448, 6).cache_key for i in (image, image.copy(), other)]
    assert keys[0] == keys[1] != keys[2]
    assert tile_image(image, 448, 1).cache_key != keys[0]
