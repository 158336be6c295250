"""Attention of the fast path: rows of qkv in, the e4m3 rows of the next linear out.

Every form appends K and V to the paged cache first. Rows that decode share one kernel, chunks of
prompts another, whole prompts among them. What a form needs of a step is made once and serves every
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nvlm.model.number_formats.fp8 import E4M3
from runtime.decoder.kernels.operands import (
    ChunkTiles,
    Contexts,
    KVPages,
    TokenRows,
    tile_tokens,
)
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.chunk_inputs import context_positions, pages_of, tiles_of
from runtime.decoder.models.hopper_weights import HopperLayer
from runtime.decoder.models.host_copy import to_device
from runtime.decoder.models.step import SequenceStep, positions_of, slots_of
from runtime.kernels.branch import Branch
from runtime.kernels.spare_rows import empty_with_spare_rows


class HopperAttention(Protocol):
    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """qkv: [T, (heads + 2 kv_heads) head_dim] in `dtype`, after bias and before RoPE. Writes
        `out` [T, heads * head_dim]: e4m3, or `dtype` where the next linear takes that."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What outlives a step."""

    forms: PlainForms  # the kernels
    layers: list[HopperLayer]  # the rank's weights, in order
    pages: list[KVPages]  # of each layer
    cos: torch.Tensor  # [max_seq_len, head_dim / 2] float32, `rope_tables` of all positions
    sin: torch.Tensor  # as cos
    k: torch.Tensor  # where the contexts of a step's chunks are gathered, as in `Contexts`
    v: torch.Tensor  # as k
    branch: Branch  # on which rows that decode are attended beside prompts

    @property
    def tile_tokens(self) -> int:
        _, kv_heads, _, head_dim = self.pages[0].k.shape
        return tile_tokens(self.layers[0].dense.weight.shape[1] // head_dim // kv_heads)

    def rows(self, positions: torch.Tensor, slots: torch.Tensor) -> TokenRows:
        return TokenRows(self.cos[positions], self.sin[positions], slots)

    def scale(self, layer: int) -> torch.Tensor | None:
        """What the next linear's input is quantised with."""
        return self.layers[layer].dense.activation_scale

    def attended(self, attention: HopperAttention, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        dtype = qkv.dtype if self.scale(layer) is None else E4M3
        width = self.layers[layer].dense.weight.shape[1]
        out = empty_with_spare_rows(len(qkv), width, dtype=dtype, device=qkv.device)
        attention.forward(layer, qkv, out)
        return out


class DecodeAttention:
    """`HopperAttention` of rows that are one sequence's token each.

    positions: [n] int32; slots: [n] int64; tables: [n, max_blocks] int32, a row valid as far as
    its sequence goes.
    """

    def __init__(
        self,
        context: AttentionContext,
        positions: torch.Tensor,
        slots: torch.Tensor,
        tables: torch.Tensor,
    ) -> None:
        self._context, self._positions, self._tables = context, positions, tables
        self._rows = context.rows(positions, slots)

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        context = self._context
        pages, scale = context.pages[layer], context.scale(layer)
        context.forms.decode_attention(
            qkv, self._rows, self._tables, self._positions, pages, scale, out
        )


class ChunkAttention:
    """`HopperAttention` of chunks of prompts that share one launch.

    positions: [T] int32; slots: [T] int64; tiles: what each program takes.
    """

    def __init__(
        self,
        context: AttentionContext,
        positions: torch.Tensor,
        slots: torch.Tensor,
        tiles: ChunkTiles,
        contexts: Contexts,
    ) -> None:
        self._context, self._tiles, self._contexts = context, tiles, contexts
        self._rows = context.rows(positions, slots)

    @classmethod
    def of(cls, context: AttentionContext, steps: list[SequenceStep]) -> ChunkAttention:
        """A chunk each. Their contexts fit the memory for them."""
        num_tokens, device = context.tile_tokens, context.cos.device
        positions, slots, tiles, pages = (
            to_device(each, device)
            for each in (
                positions_of(steps),
                slots_of(steps),
                tiles_of(steps, num_tokens),
                pages_of(steps),
            )
        )
        num_pages = to_device(torch.tensor([len(pages)], dtype=torch.int32), device)
        contexts = Contexts(pages, num_pages, context.k, context.v)
        return cls(context, positions, slots, ChunkTiles(tiles, num_tokens), contexts)

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        forms, pages = self._context.forms, self._context.pages[layer]
        q = forms.rope_append(qkv, self._rows, pages)
        scale = self._context.scale(layer)
        forms.chunk_attention(q, self._tiles, self._contexts, pages, scale, out)


def attention_of_chunks(context: AttentionContext, steps: list[SequenceStep]) -> HopperAttention:
    """A chunk each: all in one launch, or in several where their contexts do not fit at once."""
    parts, num_positions = [list[SequenceStep]()], 0
    for step in steps:
        num_positions += context_positions(step)
        if parts[-1] and num_positions > context.k.shape[1]:
            parts.append([])
            num_positions = context_positions(step)
        parts[-1].append(step)
    attentions = [ChunkAttention.of(context, part) for part in parts]
    if len(parts) == 1:
        return attentions[0]
    return InTurns([sum(len(step.token_ids) for step in part) for part in parts], attentions)


class MixedAttention:
    """`HopperAttention` of rows that decode, and after those of prompts, which run beside them: the
    former wait for the memory, the latter compute."""

    def __init__(
        self,
        context: AttentionContext,
        num_decoding: int,
        decoding: HopperAttention,
        prompts: HopperAttention,
    ) -> None:
        self._branch, self._num_decoding = context.branch, num_decoding
        self._decoding, self._prompts = decoding, prompts

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        n = self._num_decoding
        with self._branch.beside():
            self._decoding.forward(layer, qkv[:n], out[:n])
        self._prompts.forward(layer, qkv[n:], out[n:])
        self._branch.join()


class InTurns:
    """`HopperAttention` of rows whose parts come one after another. counts: rows of each."""

    def __init__(self, counts: list[int], attentions: Sequence[HopperAttention]) -> None:
        self._counts, self._attentions = counts, attentions

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        parts = qkv.split(self._counts), out.split(self._counts)
        for attention, rows, results in zip(self._attentions, *parts, strict=True):
            attention.forward(layer, rows, results)
