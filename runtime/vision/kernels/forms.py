"""The steps of a vision layer that have a kernel. Shapes and types: plain_forms.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Fp8Linear = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.dtype], torch.Tensor
]


class Forms(Protocol):
    """The module `plain_forms`, or `triton_forms.TritonForms`."""

    def cut_patches(
        self, tiles: torch.Tensor, patch_size: int, width: int, dtype: torch.dtype
    ) -> torch.Tensor: ...

    def embed(
        self, patches: torch.Tensor, class_token: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor: ...

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        layer_scale: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def normalize_qk(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        eps: float,
        num_real: int,
    ) -> torch.Tensor: ...

    def gelu(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor: ...

    def add_merge_norm(
        self,
        hidden: torch.Tensor,
        delta: torch.Tensor,
        layer_scale: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        side: int,
    ) -> torch.Tensor: ...

    def quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor: ...

    @property
    def fp8_linear(self) -> Fp8Linear: ...
