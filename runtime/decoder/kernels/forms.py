"""The steps of a decoder layer that have a kernel. Shapes and types: plain_forms.py."""

from __future__ import annotations

from typing import Protocol

import torch


class Forms(Protocol):
    """The module `plain_forms`, or `triton_forms.TritonForms`."""

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor: ...

    def gate_up_swiglu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        product_scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor: ...

    def rope_append(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        kv_scale: torch.Tensor,
    ) -> torch.Tensor: ...

    def decode_attention(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        slots: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        positions: torch.Tensor,
        kv_scale: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> torch.Tensor: ...

    def prefill_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        blocks: torch.Tensor,
        first_position: int,
        kv_scale: float,
        scale: torch.Tensor | None,
    ) -> torch.Tensor: ...

    def plan_prefill_attention(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, max_num_tokens: int
    ) -> None: ...

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...
