"""Dynamic tiling: an image becomes a grid of square tiles and a thumbnail.

Follows the README of nvidia/NVLM-D-72B (`dynamic_preprocess`) and Megatron-LM's
examples/multimodal/image_processing.py, which agree. Grids are (columns, rows).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nvlm.inputs.picture import Picture, scaling_bytes
from nvlm.inputs.picture_budget import BYTES_PER_PIXEL

Grid = tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class TiledImage:
    """A picture, cut."""

    grid: Grid  # columns and rows, without the thumbnail
    # [num_tiles, S, S, 3] uint8 RGB: the grid row by row, then the thumbnail (if any).
    tiles: NDArray[np.uint8]

    @property
    def num_tiles(self) -> int:
        return int(self.tiles.shape[0])

    @property
    def cache_key(self) -> bytes:
        """Equal exactly for equal pixels: SHA-256 of the tiles."""
        # Without a copy, which would be made under Python's lock.
        return hashlib.sha256(np.ascontiguousarray(self.tiles).data).digest()


@lru_cache
def candidate_grids(max_num_tiles: int) -> tuple[Grid, ...]:
    """All grids of at most `max_num_tiles` tiles, fewest tiles first: 14 for 6, 35 for 12."""
    sides = range(1, max_num_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides]
    grids = [grid for grid in grids if grid[0] * grid[1] <= max_num_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, image_size: int, max_num_tiles: int) -> Grid:
    """The grid whose aspect ratio is closest to the image's.

    On an exact tie the later candidate wins if the image covers more than half of its pixels.
    Compared as floats, as the reference does.
    """
    aspect = width / height
    best_difference, best = float("inf"), (1, 1)
    for columns, rows in candidate_grids(max_num_tiles):
        difference = abs(aspect - columns / rows)
        covers_half = width * height > 0.5 * image_size * image_size * columns * rows
        if difference < best_difference or (difference == best_difference and covers_half):
            best_difference, best = difference, (columns, rows)
    return best


@dataclass(frozen=True, slots=True)
class Tiler:
    """Cuts a picture. The aspect ratio is not kept: all of it is stretched to the grid."""

    image_size: int  # side of a tile, in pixels
    max_num_tiles: int  # most tiles of the grid, without the thumbnail

    def __call__(self, picture: Picture) -> TiledImage:
        columns, rows = grid = self._grid(*picture.size)
        size = self.image_size
        resized, *thumbnails = map(np.asarray, picture.scaled(*self._sides(grid)))
        pixels = resized.reshape(rows, size, columns, size, 3)
        tiles = pixels.transpose(0, 2, 1, 3, 4).reshape(-1, size, size, 3)
        tiles = np.concatenate((tiles, *(thumbnail[None] for thumbnail in thumbnails)))
        return TiledImage(grid, tiles)

    def num_bytes(self, width: int, height: int) -> int:
        """What it takes beside the picture."""
        sides = self._sides(self._grid(width, height))
        tiled = sum(4 * BYTES_PER_PIXEL * across * down for across, down in sides)
        return scaling_bytes(width, height, *sides) + tiled

    def _sides(self, grid: Grid) -> list[tuple[int, int]]:
        """Sides of the stretched picture and, beside several tiles, of the thumbnail, in pixels."""
        columns, rows = grid
        size = self.image_size
        thumbnail = [(size, size)] if columns * rows > 1 else []
        return [(columns * size, rows * size), *thumbnail]

    def _grid(self, width: int, height: int) -> Grid:
        return choose_grid(width, height, self.image_size, self.max_num_tiles)


def tile_image(image: Image.Image, image_size: int, max_num_tiles: int) -> TiledImage:
    """Cuts an RGB image."""
    return Tiler(image_size, max_num_tiles)(Picture(image, "the image"))


def normalize(tiles: torch.Tensor | NDArray[np.uint8]) -> torch.Tensor:
    """[num_tiles, S, S, 3] uint8 -> [num_tiles, 3, S, S] float32, contiguous, by ImageNet
    statistics: the same numbers on every device."""
    # 255 as a tensor: by a Python number a GPU would multiply with the rounded reciprocal.
    pixels = torch.as_tensor(tiles)
    most, mean, std = (
        torch.tensor(values, device=pixels.device).view(1, -1, 1, 1)
        for values in ((255.0,), IMAGENET_MEAN, IMAGENET_STD)
    )
    values = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(most)
    return values.sub_(mean).div_(std).contiguous()


def denormalize(tiles: NDArray[Any]) -> NDArray[np.uint8]:
    """The inverse of `normalize`: [num_tiles, 3, S, S] of any float type -> [num_tiles, S, S, 3].

    Exact for tiles that came from 8-bit pixels: float16 keeps them to 0.06 of a step. Raises
    `ValueError` for numbers that no pixel gives.
    """
    mean = np.array(IMAGENET_MEAN, np.float32).reshape(3, 1, 1)
    std = np.array(IMAGENET_STD, np.float32).reshape(3, 1, 1)
    values = (tiles.astype(np.float32) * std + mean) * 255.0
    if not ((values > -0.5) & (values < 255.5)).all():  # NaN is refused too
        raise ValueError(f"they stand for pixels from {values.min():.1f} to {values.max():.1f}")
    return np.ascontiguousarray(values.round().astype(np.uint8).transpose(0, 2, 3, 1))
