"""Requests with one thing about their image made wrong, between the encoder and the decoder.

A model that reads must do worse on them; if it does not, what was made wrong is not used. Each
takes the request of one image on a grid of several tiles, tagged `<tile_1>` ... and the thumbnail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from runtime.decoder.executor import DecoderRequest

TAG_LENGTH = 4
"""Tokens of a tag of the small model: `<tile`, `_`, number, `>`."""

Ablation = Callable[[DecoderRequest, int, int], DecoderRequest]
"""(request, tokens_per_tile, vocab_size) -> request."""


def _starts(request: DecoderRequest, tokens_per_tile: int, vocab_size: int) -> list[int]:
    """Positions of the tiles' first tokens."""
    rows = [i for i, token in enumerate(request.token_ids) if token >= vocab_size]
    return rows[::tokens_per_tile]


def _tiles(request: DecoderRequest, tokens_per_tile: int) -> torch.Tensor:
    """[tiles, tokens, hidden_size]."""
    assert request.prompt_table is not None
    return request.prompt_table.unflatten(0, (-1, tokens_per_tile))


def shuffle_tiles(request: DecoderRequest, tokens_per_tile: int, vocab_size: int) -> DecoderRequest:
    """Every tile of the grid stands under its neighbour's tag."""
    tiles = _tiles(request, tokens_per_tile)
    tiles = torch.cat((tiles[:-1].roll(1, 0), tiles[-1:]))
    return replace(request, prompt_table=tiles.flatten(0, 1))


def remove_thumbnail(
    request: DecoderRequest, tokens_per_tile: int, vocab_size: int
) -> DecoderRequest:
    """Its tokens and its tag."""
    assert request.prompt_table is not None
    start = _starts(request, tokens_per_tile, vocab_size)[-1]
    token_ids = list(request.token_ids)
    del token_ids[start - TAG_LENGTH : start + tokens_per_tile]
    return replace(
        request,
        token_ids=token_ids,
        prompt_table=request.prompt_table[:-tokens_per_tile],
        rows_per_image=(request.rows_per_image[0] - tokens_per_tile,),
    )


def remove_tags(request: DecoderRequest, tokens_per_tile: int, vocab_size: int) -> DecoderRequest:
    token_ids = list(request.token_ids)
    for start in reversed(_starts(request, tokens_per_tile, vocab_size)):
        del token_ids[start - TAG_LENGTH : start]
    return replace(request, token_ids=token_ids)


def swap_tags(request: DecoderRequest, tokens_per_tile: int, vocab_size: int) -> DecoderRequest:
    """Every tile of the grid has its neighbour's number; the pictures stay where they are."""
    token_ids = list(request.token_ids)
    numbers = [start - 2 for start in _starts(request, tokens_per_tile, vocab_size)[:-1]]
    values = [token_ids[position] for position in numbers]
    for position, value in zip(numbers, values[1:] + values[:1], strict=True):
        token_ids[position] = value
    return replace(request, token_ids=token_ids)


def pixel_shuffle_v1(
    request: DecoderRequest, tokens_per_tile: int, vocab_size: int
) -> DecoderRequest:
    """InternVL's first pixel shuffle left a tile's cells transposed (modeling_nvlm_d.py)."""
    side = round(tokens_per_tile**0.5)
    cells = _tiles(request, tokens_per_tile).unflatten(1, (side, side))
    return replace(request, prompt_table=cells.transpose(1, 2).flatten(0, 2))
