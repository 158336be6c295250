"""Every training font's letters and digits as one array of bitmaps, with their widths."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_letters
NUM_DIGITS = 10
EM = 64
"""Pixels of an em in the finest bitmaps."""
CELL = 96
"""Side of a bitmap: 1.5 em, with the glyph's origin at ORIGIN."""
ORIGIN = (16, 62)
"""Pixel of a cell where a glyph's baseline begins: a quarter em in, 0.97 em down."""
CAP_MIDDLE = 0.35
"""Em from the baseline up to the middle of a capital, which is where a line's centre lies."""


@dataclass(frozen=True, slots=True)
class Atlas:
    """bitmaps: [fonts, characters, CELL, CELL] uint8; advances: [fonts, characters] float32 em.

    has_lower_case: [fonts]; false for fonts that print capitals for small letters.
    """

    bitmaps: NDArray[np.uint8]
    advances: NDArray[np.float32]
    has_lower_case: NDArray[np.bool_]


def draw_atlas(font_files: list[Path]) -> Atlas:
    """Draws every font's CHARACTERS. Raises OSError for a file FreeType can't read."""
    bitmaps = np.zeros((len(font_files), len(CHARACTERS), CELL, CELL), np.uint8)
    advances = np.zeros((len(font_files), len(CHARACTERS)), np.float32)
    for index, path in enumerate(font_files):
        font = ImageFont.truetype(path, EM, layout_engine=ImageFont.Layout.BASIC)
        for j, character in enumerate(CHARACTERS):
            cell = Image.new("L", (CELL, CELL))
            ImageDraw.Draw(cell).text(ORIGIN, character, 255, font, anchor="ls")
            bitmaps[index, j] = np.asarray(cell)
            advances[index, j] = font.getlength(character) / EM
    lower, upper = (
        bitmaps[:, [CHARACTERS.index(c) for c in letters]].astype(np.float32)
        for letters in ("aegbdr", "AEGBDR")
    )
    difference = np.abs(lower - upper).mean((1, 2, 3)) / np.maximum(upper.mean((1, 2, 3)), 1)
    return Atlas(bitmaps, advances, difference > 0.3)
