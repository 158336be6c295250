"""What may be in FP8 by itself: a linear, a layer, a kind of linear, the KV cache, vision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nvlm.model.decoder import DECODER_LINEARS

KV_CACHE = "kv_cache"
"""Stands beside `DECODER_LINEARS`: the K and V of one layer."""
VISION = "vision"

Piece = tuple[int, str]
"""A layer's index, and a linear of it or `KV_CACHE`."""


@dataclass(frozen=True, slots=True)
class Part:
    """has_vision: all linears of the ViT's layers are in FP8 too."""

    name: str
    pieces: frozenset[Piece]
    has_vision: bool = False

    @property
    def first_layer(self) -> int:
        """Layers before it are as they were."""
        return min((layer for layer, _ in self.pieces), default=0)


def _pieces(num_layers: int) -> list[Piece]:
    return [(i, name) for i in range(num_layers) for name in (*DECODER_LINEARS, KV_CACHE)]


def _grouped(num_layers: int, name_of: Callable[[Piece], str]) -> list[Part]:
    groups: dict[str, set[Piece]] = {}
    for piece in _pieces(num_layers):
        groups.setdefault(name_of(piece), set()).add(piece)
    return [Part(name, frozenset(pieces)) for name, pieces in groups.items()]


GROUPINGS: dict[str, Callable[[Piece], str]] = {
    "linear": lambda piece: f"layers.{piece[0]}.{piece[1]}",
    "layer": lambda piece: f"layers.{piece[0]}",
    "kind": lambda piece: piece[1],
}
"""By the name that --by gives."""


def parts(num_layers: int, by: str, has_vision_scales: bool) -> list[Part]:
    """One part at a time, then all of the decoder, vision, and everything."""
    whole = frozenset(_pieces(num_layers))
    result = [*_grouped(num_layers, GROUPINGS[by]), Part("decoder", whole)]
    if has_vision_scales:
        result += [Part(VISION, frozenset(), True), Part("everything", whole, True)]
    return result
