"""Oracle of image tiling: grid choice in exact fractions and as published, tiles through PIL.

In: a PIL image. Out: normalised float32 tiles, row-major, thumbnail last. It knows no model.
Source: dynamic_preprocess in the README of nvidia/NVLM-D-72B. `grid_float` is what the published
code answers, `grid` what it means; they part on some exact midpoints (README.md beside this file).
"""

from fractions import Fraction

import numpy as np
from PIL import Image

_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


def grid(width: int, height: int, max_num_tiles: int, image_size: int = 448) -> tuple[int, int]:
    """(columns, rows) in rational arithmetic: the nearest ratio, ties resolved by area.

    Of the grids at the smallest exact distance, the largest whose pixels the image more than half
    fills; when there is none, the smallest. The published loop gets there by replacements.
    """
    aspect, area = Fraction(width, height), Fraction(width * height, image_size**2)
    grids = [
        (columns, rows)
        for columns in range(1, max_num_tiles + 1)
        for rows in range(1, max_num_tiles // columns + 1)
    ]
    distances = {g: abs(aspect - Fraction(*g)) for g in grids}
    nearest = [g for g in grids if distances[g] == min(distances.values())]
    filled = [g for g in nearest if area > Fraction(g[0] * g[1], 2)]
    return max(filled, key=_size) if filled else min(nearest, key=_size)


def _size(columns_rows: tuple[int, int]) -> int:
    return columns_rows[0] * columns_rows[1]


def grid_float(
    width: int, height: int, max_num_tiles: int, image_size: int = 448
) -> tuple[int, int]:
    """(columns, rows) in the published order of float operations, rounding included."""
    ratios = {
        (i, j)
        for n in range(1, max_num_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if 1 <= i * j <= max_num_tiles
    }
    aspect, area = width / height, width * height
    best_difference, best = float("inf"), (1, 1)
    for i, j in sorted(ratios, key=lambda ratio: ratio[0] * ratio[1]):
        difference = abs(aspect - i / j)
        if difference < best_difference:
            best_difference, best = difference, (i, j)
        elif difference == best_difference and area > 0.5 * image_size * image_size * i * j:
            best = (i, j)
    return best


def tiles(image: Image.Image, max_num_tiles: int, image_size: int = 448) -> np.ndarray:
    """[num_tiles, 3, S, S] float32, ImageNet-normalised; num_tiles is 1 or columns * rows + 1."""
    image = image.convert("RGB")
    columns, rows = grid_float(image.width, image.height, max_num_tiles, image_size)
    whole = image.resize((image_size * columns, image_size * rows), Image.Resampling.BICUBIC)
    pieces = []
    for row in range(rows):
        for column in range(columns):
            left, top = column * image_size, row * image_size
            pieces.append(whole.crop((left, top, left + image_size, top + image_size)))
    if len(pieces) != 1:
        pieces.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    pixels = np.stack([np.asarray(piece) for piece in pieces])  # [n, S, S, 3] uint8
    normalised = (pixels.astype(np.float32) / np.float32(255) - _MEAN) / _STD
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
