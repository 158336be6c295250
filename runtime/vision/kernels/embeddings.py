"""Triton: pixels normalised and cut into patches, and patches after the class token with their
positions. A program takes one patch, or one position."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.inputs.tiling import IMAGENET_MEAN, IMAGENET_STD


@triton.jit
def _cut_patches(
    tiles, out, image_size, side, width, mean0, mean1, mean2, std0, std1, std2,
    PATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0)
    tile, y, x = patch // (side * side), patch // side % side, patch % side
    index = tl.arange(0, BLOCK)
    channel = index // (PATCH * PATCH)
    row, column = y * PATCH + index // PATCH % PATCH, x * PATCH + index % PATCH
    is_pixel = channel < 3
    source = ((tile.to(tl.int64) * image_size + row) * image_size + column) * 3 + channel
    pixels = tl.load(tiles + source, is_pixel, other=0).to(tl.float32)
    mean = tl.where(channel == 0, mean0, tl.where(channel == 1, mean1, mean2))
    std = tl.where(channel == 0, std0, tl.where(channel == 1, std1, std2))
    values = tl.where(is_pixel, tl.div_rn(tl.div_rn(pixels, 255.0) - mean, std), 0.0)
    target = out + patch.to(tl.int64) * width + index
    tl.store(target, values.to(out.dtype.element_ty), index < width)


def cut_patches(
    tiles: torch.Tensor, patch_size: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    assert tiles.is_contiguous()
    image_size = tiles.shape[1]
    side = image_size // patch_size
    out = torch.empty(len(tiles) * side * side, width, dtype=dtype, device=tiles.device)
    _cut_patches[(len(out),)](
        tiles, out, image_size, side, width, *IMAGENET_MEAN, *IMAGENET_STD, PATCH=patch_size,
        BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _embed(patches, class_token, positions, out, num_positions, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    tile, position = row // num_positions, row % num_positions
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    source = patches + (row - tile - 1) * size
    if position == 0:
        source = class_token
    x = tl.load(source + columns, mask, other=0.0)
    place = tl.load(positions + position * size + columns, mask, other=0.0)
    added = (x.to(tl.float32) + place.to(tl.float32)).to(x.dtype)
    tl.store(out + row * size + columns, added, mask)


def embed(
    patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    num_tiles, num_patches, size = patches.shape
    out = patches.new_empty(num_tiles, 1 + num_patches, size)
    _embed[(num_tiles * (1 + num_patches),)](
        patches, class_token, positions, out, 1 + num_patches, size,
        BLOCK=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out
