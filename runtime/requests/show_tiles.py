"""A picture of what the model saw: every image's tiles in their grid, each under its tag."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nvlm.inputs.prompt import tile_tags
from nvlm.inputs.tiling import TiledImage
from nvlm.program.errors import UserError

_GAP = 12
_LABEL_HEIGHT = 22
_PAPER, _INK, _FRAME = (255, 255, 255), (20, 24, 32), (150, 156, 166)


def draw_tiles(images: Sequence[TiledImage]) -> Image.Image:
    """One image below the other; its grid row by row, the thumbnail to the right of it."""
    sheets = [_draw_image(image) for image in images]
    width = max(sheet.width for sheet in sheets)
    result = Image.new("RGB", (width, sum(sheet.height for sheet in sheets)), _PAPER)
    top = 0
    for sheet in sheets:
        result.paste(sheet, (0, top))
        top += sheet.height
    return result


def write_tiles(images: Sequence[TiledImage], path: Path) -> None:
    """Raises `UserError` for a file that cannot be written as an image."""
    try:
        draw_tiles(images).save(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--show_tiles {path} cannot be written ({error}); give the name of a .png file in a "
            "folder that exists"
        ) from None


def _draw_image(image: TiledImage) -> Image.Image:
    columns, rows = image.grid
    size = image.tiles.shape[1]
    has_thumbnail = image.num_tiles > columns * rows
    step = size + _GAP
    width = (columns + has_thumbnail) * step + _GAP * (1 + has_thumbnail)
    sheet = Image.new("RGB", (width, rows * (step + _LABEL_HEIGHT) + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, tag in enumerate(tile_tags(image.num_tiles)):
        row, column = divmod(index, columns)
        x = _GAP + column * step
        if has_thumbnail and index == image.num_tiles - 1:
            row, x = 0, 2 * _GAP + columns * step
        y = _GAP + row * (step + _LABEL_HEIGHT)
        font = _font(tag, size)
        draw.text((x, y + _LABEL_HEIGHT - 5), tag, _INK, font, anchor="ls")
        y += _LABEL_HEIGHT
        draw.rectangle((x - 1, y - 1, x + size, y + size), outline=_FRAME)
        sheet.paste(Image.fromarray(image.tiles[index]), (x, y))
    return sheet


def _font(tag: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font in which the tag just fits over its tile, 16 pixels high at most."""
    for size in range(16, 6, -1):
        font = ImageFont.load_default(size)
        if font.getlength(tag) <= width:
            return font
    return ImageFont.load_default(6)
