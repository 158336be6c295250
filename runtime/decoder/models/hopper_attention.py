"""Attention of the fast path: rows of qkv in, the e4m3 rows of the next linear out.

Every form appends K and V to the paged cache first. Rows that decode share one kernel, prompts
take one call each. What a form needs of a step is made once and serves every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from runtime.decoder.kernels.operands import KVPages, TokenRows
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.hopper_weights import HopperLayer
from runtime.decoder.models.host_copy import to_device
from runtime.decoder.models.step import SequenceStep


class HopperAttention(Protocol):
    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """qkv: [T, (heads + 2 kv_heads) head_dim] in `dtype`, after bias and before RoPE. Returns
        e4m3 [T, heads * head_dim]."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What outlives a step. pages: of each layer. cos, sin: `rope_tables` of positions 0 to
    max_seq_len - 1."""

    forms: PlainForms
    layers: list[HopperLayer]
    pages: list[KVPages]
    cos: torch.Tensor
    sin: torch.Tensor

    def rows(self, positions: torch.Tensor, slots: torch.Tensor) -> TokenRows:
        return TokenRows(self.cos[positions], self.sin[positions], slots)


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

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        context = self._context
        scale = context.layers[layer].dense.activation_scale
        return context.forms.decode_attention(
            qkv, self._rows, self._tables, self._positions, context.pages[layer], scale
        )


class PromptAttention:
    """`HopperAttention` of prompts or chunks of them, one `step` each.

    positions, slots: [T] int64, of the steps' rows in order.
    """

    def __init__(
        self,
        context: AttentionContext,
        steps: list[SequenceStep],
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        self._context, self._steps = context, steps
        self._counts = [len(step.token_ids) for step in steps]
        self._blocks = [to_device(torch.tensor(step.blocks), positions.device) for step in steps]
        self._rows = context.rows(positions, slots)

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        forms, pages = self._context.forms, self._context.pages[layer]
        scale = self._context.layers[layer].dense.activation_scale
        q = forms.rope_append(qkv, self._rows, pages)
        parts = [
            forms.prefill_attention(queries, pages, blocks, step.first_position, scale)
            for step, queries, blocks in zip(
                self._steps, q.split(self._counts), self._blocks, strict=True
            )
        ]
        return _cat_e4m3(parts)


class MixedAttention:
    """`HopperAttention` of rows that decode and, after those, prompts."""

    def __init__(
        self, num_decoding: int, decoding: DecodeAttention, prompts: PromptAttention
    ) -> None:
        self._num_decoding, self._decoding, self._prompts = num_decoding, decoding, prompts

    def forward(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        n = self._num_decoding
        return _cat_e4m3(
            [self._decoding.forward(layer, qkv[:n]), self._prompts.forward(layer, qkv[n:])]
        )


def _cat_e4m3(parts: list[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
