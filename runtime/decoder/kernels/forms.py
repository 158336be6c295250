"""The steps of a decoder layer that have a kernel. Shapes and types: plain_forms.py."""

from __future__ import annotations

from typing import Protocol

import torch


class Forms(Protocol):
    """The module `plain_forms`, or `triton_forms.TritonForms`.

    following: e4m3 weights that the next linear reads, to bring nearer meanwhile.
    """

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        scale: torch.Tensor | None,
        following: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def swiglu_quantize(
        self, gate_up: torch.Tensor, scale: torch.Tensor, following: torch.Tensor | None = None
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
        following: torch.Tensor | None = None,
    ) -> torch.Tensor: ...

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
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

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor: ...

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor: ...
