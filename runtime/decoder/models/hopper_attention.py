"""Attention of the fast path: rows of qkv in, the e4m3 rows of the next linear out.

Every form appends K and V to the paged cache first. Rows that decode share one kernel, chunks of
prompts another, long whole prompts take one call each. What a form needs of a step is made once
and serves every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from nvlm.model.number_formats.fp8 import E4M3
from runtime.decoder.kernels.operands import ChunkTiles, KVPages, TokenRows, tile_tokens
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.chunk_inputs import tables_of, tiles_of
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

    positions: [T] int32; slots: [T] int64; tiles: what each program takes; tables: [chunks,
    max_blocks] int32.
    """

    def __init__(
        self,
        context: AttentionContext,
        positions: torch.Tensor,
        slots: torch.Tensor,
        tiles: ChunkTiles,
        tables: torch.Tensor,
    ) -> None:
        self._context, self._tiles, self._tables = context, tiles, tables
        self._rows = context.rows(positions, slots)

    @classmethod
    def of(cls, context: AttentionContext, steps: list[SequenceStep]) -> ChunkAttention:
        """A chunk each."""
        num_tokens, device = context.tile_tokens, context.cos.device
        positions, slots, tiles, tables = (
            to_device(each, device)
            for each in (
                positions_of(steps),
                slots_of(steps),
                tiles_of(steps, num_tokens),
                tables_of(steps),
            )
        )
        return cls(context, positions, slots, ChunkTiles(tiles, num_tokens), tables)

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        forms, pages = self._context.forms, self._context.pages[layer]
        q = forms.rope_append(qkv, self._rows, pages)
        scale = self._context.scale(layer)
        forms.chunk_attention(q, self._tiles, self._tables, pages, scale, out)


class PromptAttention:
    """`HopperAttention` of whole prompts, one `step` each."""

    def __init__(self, context: AttentionContext, steps: list[SequenceStep]) -> None:
        device = context.cos.device
        self._context = context
        self._counts = [len(step.token_ids) for step in steps]
        self._blocks = [to_device(torch.tensor(step.blocks), device) for step in steps]
        positions, slots = (to_device(each(steps), device) for each in (positions_of, slots_of))
        self._rows = context.rows(positions, slots)

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        forms, pages = self._context.forms, self._context.pages[layer]
        scale = self._context.scale(layer)
        q = forms.rope_append(qkv, self._rows, pages)
        parts = zip(q.split(self._counts), self._blocks, out.split(self._counts), strict=True)
        for queries, blocks, rows in parts:
            forms.prefill_attention(queries, pages, blocks, scale, rows)


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


class PartedAttention:
    """`HopperAttention` of two kinds of rows, one after the other. num_first: rows of the first."""

    def __init__(self, num_first: int, first: HopperAttention, rest: HopperAttention) -> None:
        self._num_first, self._first, self._rest = num_first, first, rest

    def forward(self, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        n = self._num_first
        self._first.forward(layer, qkv[:n], out[:n])
        self._rest.forward(layer, qkv[n:], out[n:])
