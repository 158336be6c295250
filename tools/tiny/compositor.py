"""Scenes to pixels and to dense labels, in batches on one device.

Every canvas pixel looks up the line it lies in, the character under it and the character's bitmap,
so drawing is a few gathers per pixel; the same geometry labels the centres of patches and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from nvlm.inputs.tiling import Grid
from tools.tiny.atlas import CAP_MIDDLE, CELL, CHARACTERS, EM, ORIGIN, Atlas
from tools.tiny.scene import Lines, SceneBatch, Shapes

NUM_LABELS = 1 + len(CHARACTERS) + 3
"""Nothing, the characters, the shapes."""
IGNORE = -100
_MIN_READABLE_EM = 9.0
_OVERHANG = 0.15


@dataclass(slots=True)
class Labels:
    """What points show, each [N, P]: 0 for nothing, then characters, then shapes; the character's
    index in its line (8 more on a second line) or -1; its colour's name or IGNORE."""

    content: Tensor
    index: Tensor
    colour: Tensor

    @classmethod
    def nothing(cls, num_scenes: int, num_points: int, device: torch.device) -> Labels:
        shape = (num_scenes, num_points)
        return cls(*(torch.full(shape, value, device=device) for value in (0, -1, IGNORE)))

    def tiles(self, num_tiles: int) -> Labels:
        """[N, P] -> [N, tiles, P / tiles]."""
        return Labels(*(getattr(self, f.name).unflatten(1, (num_tiles, -1)) for f in fields(self)))


@dataclass(slots=True)
class DeviceLines:
    """`Lines` as tensors, each with its rows first."""

    characters: Tensor
    starts: Tensor
    centre: Tensor
    em: Tensor
    angle: Tensor
    font: Tensor
    colour: Tensor
    colour_name: Tensor

    @classmethod
    def of(cls, lines: Lines, device: torch.device, rows: slice) -> DeviceLines:
        return cls(
            *(
                torch.from_numpy(getattr(lines, f.name)[rows]).to(device, non_blocking=True)
                for f in fields(cls)
            )
        )


def _line_coordinates(lines: DeviceLines, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Canvas points x, y [N or 1, P] -> (u, v) em along and below the line's middle, and the index
    of the character there, each [N, P]. Left of the first counts as the first."""
    dx, dy = x - lines.centre[:, :1], y - lines.centre[:, 1:]
    cos, sin = lines.angle.cos()[:, None], lines.angle.sin()[:, None]
    ends = lines.starts.masked_fill(lines.starts > 1e3, 0).amax(1, keepdim=True)
    u = (cos * dx + sin * dy) / lines.em[:, :1] + ends / 2
    v = (cos * dy - sin * dx) / lines.em[:, 1:]
    index = torch.zeros_like(u, dtype=torch.int64)
    for k in range(1, lines.starts.shape[1] - 1):
        index += u >= lines.starts[:, k : k + 1]
    count = (lines.characters >= 0).sum(1, keepdim=True)
    return u, v, torch.minimum(index, (count - 1).clamp(min=0))


class Compositor:
    def __init__(self, atlas: Atlas, tile_size: int, device: torch.device) -> None:
        self.tile_size = tile_size
        self.device = device
        levels = [torch.from_numpy(atlas.bitmaps).flatten(0, 1)[:, None]]
        for _ in range(2):
            levels.append(avg_pool2d(levels[-1].float(), 2).round().to(torch.uint8))
        self._level_offset = torch.tensor(np.cumsum([0] + [x.numel() for x in levels])[:3])
        self._level_offset = self._level_offset.to(device)
        self._texels = torch.cat([level.flatten() for level in levels]).to(device)

    def line_alpha(self, lines: DeviceLines, x: Tensor, y: Tensor) -> Tensor:
        """How much ink lies on each canvas point: [N, P] in 0..1."""
        u, v, index = _line_coordinates(lines, x, y)
        character = lines.characters.clamp(min=0).gather(1, index)
        start = lines.starts.gather(1, index)
        scale = lines.em.amin(1, keepdim=True)  # pixels of an em on the canvas
        level = torch.floor(torch.log2(EM / scale) + 0.5).clamp(0, 2).to(torch.int64)
        side = CELL >> level  # pixels of a cell at that level
        em = EM / 2.0**level
        px = (u - start) * em + ORIGIN[0] * em / EM - 0.5
        py = (v - CAP_MIDDLE) * em + ORIGIN[1] * em / EM - 0.5
        inside = (u > -_OVERHANG) & (v.abs() < 0.75) & (px > -1) & (px < side) & (py > -1)
        inside &= (py < side) & (lines.characters[:, :1] >= 0)
        x0, y0 = px.floor(), py.floor()
        fx, fy = px - x0, py - y0
        x0, y0 = x0.to(torch.int64), y0.to(torch.int64)
        base = self._level_offset[level] + (lines.font[:, None] * len(CHARACTERS) + character) * (
            side * side
        )
        alpha = torch.zeros_like(u)
        for ox, wx in ((0, 1 - fx), (1, fx)):
            for oy, wy in ((0, 1 - fy), (1, fy)):
                column = torch.minimum((x0 + ox).clamp(min=0), side - 1)
                row = torch.minimum((y0 + oy).clamp(min=0), side - 1)
                alpha += self._texels[base + row * side + column].to(u.dtype) * (wx * wy)
        sharpen = (scale / EM).clamp(1, 3)  # enlarged bitmaps keep crisp edges
        alpha = ((alpha / 255 - 0.5) * sharpen + 0.5).clamp(0, 1)
        return alpha * inside

    def line_labels(self, lines: DeviceLines, x: Tensor, y: Tensor) -> Labels:
        """Labels of the points x, y [N or 1, P]."""
        u, v, index = _line_coordinates(lines, x, y)
        ends = lines.starts.masked_fill(lines.starts > 1e3, 0).amax(1, keepdim=True)
        hit = (u >= 0) & (u < ends) & (v.abs() < 0.5) & (lines.characters[:, :1] >= 0)
        label = 1 + lines.characters.clamp(min=0).gather(1, index)
        colour = lines.colour_name[:, None].expand_as(label)
        return Labels(label.where(hit, 0), index.where(hit, -1), colour.where(hit, IGNORE))


def shape_distance(shapes: dict[str, Tensor], k: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to shape k's border, negative inside: [N, P] pixels."""
    centre, radius = shapes["centre"][:, k], shapes["radius"][:, k, None]
    angle, kind = shapes["angle"][:, k, None], shapes["kind"][:, k, None]
    dx, dy = x - centre[:, :1], y - centre[:, 1:]
    circle = torch.hypot(dx, dy) - radius
    across = angle.cos() * dx + angle.sin() * dy
    down = angle.cos() * dy - angle.sin() * dx
    square = torch.maximum(across.abs(), down.abs()) - radius * 0.7071
    slope = 0.8660254
    sides = (down, slope * across - 0.5 * down, -slope * across - 0.5 * down)
    triangle = torch.maximum(torch.maximum(sides[0], sides[1]), sides[2]) - radius * 0.5
    distance = torch.where(kind == 0, circle, torch.where(kind == 1, square, triangle))
    return distance.masked_fill(kind < 0, 1e4)


def shapes_on(shapes: Shapes, device: torch.device, rows: slice) -> dict[str, Tensor]:
    return {
        f.name: torch.from_numpy(getattr(shapes, f.name)[rows]).to(device, non_blocking=True)
        for f in fields(shapes)
    }


def to_tiles(canvas: Tensor, grid: Grid) -> Tensor:
    """[B, C, rows S, columns S] -> [B, tiles, C, S, S], row by row."""
    columns, rows = grid
    cut = canvas.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # [B, C, r, S, c, S]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def grid_points(
    grid: Grid, tile_size: int, side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Canvas x, y of the centres of side x side cells of every tile and of the thumbnail.

    [1, (tiles + thumbnail) * side * side]; a single tile has no thumbnail.
    """
    columns, rows = grid
    centres = (torch.arange(side, device=device) + 0.5) * (tile_size / side)
    xs, ys = [], []
    for row in range(rows):
        for column in range(columns):
            xs.append((centres + column * tile_size).expand(side, side))
            ys.append((centres + row * tile_size)[:, None].expand(side, side))
    if columns * rows > 1:
        xs.append((centres * columns).expand(side, side))
        ys.append((centres * rows)[:, None].expand(side, side))
    return torch.stack(xs).flatten()[None], torch.stack(ys).flatten()[None]


@dataclass(slots=True)
class Picture:
    """tiles [B, tiles (+ thumbnail), 3, S, S] float in 0..1, and labels for the dense losses.

    patches, tokens: `Labels` [B, tiles, points] of what lies at the centre of each; content is
    IGNORE where it can't be read.
    """

    tiles: Tensor
    patches: Labels
    tokens: Labels


def draw(
    compositor: Compositor,
    batch: SceneBatch,
    num_lines: int,
    patches_per_side: int,
    generator: torch.Generator,
) -> Picture:
    """Draws all scenes of a batch; `num_lines` is 2 for scenes and more for pages."""
    device, size = compositor.device, compositor.tile_size
    grid, (columns, rows) = batch.grid, batch.grid
    num_scenes = len(batch.background)
    canvas = _background(batch, size, device, generator)
    xs = torch.arange(columns * size, device=device) + 0.5
    ys = torch.arange(rows * size, device=device) + 0.5
    x, y = xs.repeat(rows * size)[None], ys.repeat_interleave(columns * size)[None]
    sides = (patches_per_side, patches_per_side // 2)
    points = [grid_points(grid, size, side, device) for side in sides]
    labels = [Labels.nothing(num_scenes, p[0].shape[1], device) for p in points]
    for k in range(num_lines):
        stop = batch.num_two_lines if k == 1 and num_lines == 2 else batch.num_text
        lines = DeviceLines.of(batch.lines, device, slice(k * num_scenes, k * num_scenes + stop))
        if stop == 0:
            continue
        alpha = compositor.line_alpha(lines, x, y).unflatten(1, canvas.shape[2:])[:, None]
        canvas[:stop] += alpha * (lines.colour[:, :, None, None] - canvas[:stop])
        for found, (px, py) in zip(labels, points, strict=True):
            new = compositor.line_labels(lines, px, py)
            content = _hide_unreadable(new.content, lines, grid, px.shape[1])
            hit = new.content != 0
            found.content[:stop] = torch.where(hit, content, found.content[:stop])
            found.index[:stop] = torch.where(hit, new.index + 8 * min(k, 1), found.index[:stop])
            found.colour[:stop] = torch.where(hit, new.colour, found.colour[:stop])
    _draw_tile_digits(compositor, batch, canvas, labels, sides)
    _draw_shapes(batch, canvas, labels, x, y, points, device)
    canvas = _degrade(canvas, batch.blur, generator)
    tiles = to_tiles(canvas, grid)
    if columns * rows > 1:
        tiles = torch.cat((tiles, avg_pool2d(canvas, (rows, columns))[:, None]), 1)
    num_tiles = tiles.shape[1]
    return Picture(
        tiles,
        *(found.tiles(num_tiles) for found in labels),
    )


def _hide_unreadable(label: Tensor, lines: DeviceLines, grid: Grid, num_points: int) -> Tensor:
    """Characters too small to distinguish in the thumbnail are not asked for there."""
    columns, rows = grid
    if columns * rows == 1:
        return label
    em = torch.minimum(lines.em[:, 0] / columns, lines.em[:, 1] / rows)[:, None]
    is_thumbnail = torch.arange(num_points, device=label.device)[None] >= (
        num_points * columns * rows // (columns * rows + 1)
    )
    hide = is_thumbnail & (em < _MIN_READABLE_EM) & (label > 0)
    return label.masked_fill(hide, IGNORE)


def _background(
    batch: SceneBatch, size: int, device: torch.device, generator: torch.Generator
) -> Tensor:
    """A gradient between the two colours, clouds and a little lighting: [B, 3, H, W]."""
    columns, rows = batch.grid
    ends = torch.from_numpy(batch.background).to(device, non_blocking=True)
    num_scenes = len(ends)
    shape = (num_scenes, 1, rows * size, columns * size)
    coarse = torch.rand(num_scenes, 1, 2, 2, generator=generator, device=device)
    ramp = interpolate(coarse, shape[2:], mode="bilinear", align_corners=True)
    canvas = torch.lerp(ends[:, 0, :, None, None], ends[:, 1, :, None, None], ramp)
    clouds = torch.randn(num_scenes, 1, 5 * rows, 5 * columns, generator=generator, device=device)
    strength = 0.05 * torch.rand(num_scenes, 1, 1, 1, generator=generator, device=device) ** 2
    return canvas + interpolate(clouds, shape[2:], mode="bilinear") * strength


def _draw_tile_digits(
    compositor: Compositor,
    batch: SceneBatch,
    canvas: Tensor,
    labels: list[Labels],
    sides: tuple[int, int],
) -> None:
    columns, rows = batch.grid
    num_tiles = columns * rows
    num_rows = len(batch.tile_lines.font)
    if num_rows == 0:
        return
    size, device = compositor.tile_size, compositor.device
    scenes = slice(batch.num_text, batch.num_text + num_rows // num_tiles)
    lines = DeviceLines.of(batch.tile_lines, device, slice(0, num_rows))
    points = torch.arange(size, device=device) + 0.5
    x, y = points.repeat(size)[None], points.repeat_interleave(size)[None]
    alpha = compositor.line_alpha(lines, x, y).view(-1, rows, columns, size, size)
    alpha = alpha.permute(0, 1, 3, 2, 4).reshape(-1, 1, rows * size, columns * size)
    colour = lines.colour.view(-1, num_tiles, 3)[:, 0, :, None, None]
    canvas[scenes] += alpha * (colour - canvas[scenes])
    for found, side in zip(labels, sides, strict=True):
        px, py = grid_points((1, 1), size, side, device)
        new = compositor.line_labels(lines, px, py)
        cells = num_tiles * side * side
        for f in fields(Labels):
            getattr(found, f.name)[scenes, :cells] = getattr(new, f.name).reshape(-1, cells)
        found.content[scenes, cells:] = IGNORE


def _draw_shapes(
    batch: SceneBatch,
    canvas: Tensor,
    labels: list[Labels],
    x: Tensor,
    y: Tensor,
    points: list[tuple[Tensor, Tensor]],
    device: torch.device,
) -> None:
    num_scenes = len(batch.background)
    first = batch.num_text + len(batch.tile_lines.font) // (batch.grid[0] * batch.grid[1])
    if first == num_scenes:
        return
    rows = slice(first, num_scenes)
    shapes = shapes_on(batch.shapes, device, rows)
    for k in range(shapes["kind"].shape[1]):
        alpha = (0.5 - shape_distance(shapes, k, x, y)).clamp(0, 1)
        alpha = alpha.unflatten(1, canvas.shape[2:])[:, None]
        canvas[rows] += alpha * (shapes["colour"][:, k, :, None, None] - canvas[rows])
        for found, (px, py) in zip(labels, points, strict=True):
            hit = shape_distance(shapes, k, px, py) < 0
            label = 1 + len(CHARACTERS) + shapes["kind"][:, k, None]
            found.content[rows] = torch.where(hit, label, found.content[rows])


def _degrade(canvas: Tensor, blur: float, generator: torch.Generator) -> Tensor:
    """A coarser picture stretched to the canvas, uneven light, noise; clamped to 0..1."""
    num_scenes, _, height, width = canvas.shape
    if blur > 1:
        low = (max(8, round(height / blur)), max(8, round(width / blur)))
        canvas = interpolate(canvas, low, mode="bilinear", antialias=True)
        canvas = interpolate(canvas, (height, width), mode="bicubic")
    device = canvas.device
    light = torch.rand(num_scenes, 1, 2, 2, generator=generator, device=device)
    light = interpolate(light, (height, width), mode="bilinear", align_corners=True)
    amount = 0.25 * torch.rand(num_scenes, 1, 1, 1, generator=generator, device=device) ** 2
    noise = 0.06 * torch.rand(num_scenes, 1, 1, 1, generator=generator, device=device) ** 2
    grain = torch.randn(canvas.shape, generator=generator, device=device)
    return (canvas * (1 - amount * light) + noise * grain).clamp(0, 1)
