"""The functions of `plain_forms` as Triton kernels, bound to one device's workspace."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from runtime.decoder.kernels import elementwise, paged_attention, rope, streaming_linear
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.prefetch import NO_PREFETCH, Prefetch
from runtime.kernels.quantization import scale_quantize
from runtime.kernels.tensor_core_linear import TensorCoreLinear

_PROGRAMS_PER_MULTIPROCESSOR = 2


class TritonForms:
    """prefetch: of the next linear's weights, while a small kernel runs. use_fast_accum:
    tensor_core_linear.py. use_cudnn: for whole prompts, whose every new length it plans for some
    30 ms; by default FlashAttention, which needs no plan. pdl: a kernel is launched while the one
    before ends, and reads the weights and scales it needs (programmatic dependent launch). All but
    what an earlier kernel of the step wrote just before may be read ahead of `gdc_wait`, since no
    kernel lets the next one start before its own wait is over."""

    def __init__(
        self,
        device: torch.device,
        *,
        prefetch: Prefetch = NO_PREFETCH,
        use_fast_accum: bool = False,
        use_cudnn: bool = False,
        pdl: bool = False,
    ) -> None:
        self._use_fast_accum, self._use_cudnn, self._pdl = use_fast_accum, use_cudnn, pdl
        settings: dict[str, Any] = {"prefetched": prefetch, "pdl": pdl}
        self.add_rms_norm = partial(elementwise.add_rms_norm, **settings)
        self.swiglu_quantize = partial(elementwise.swiglu_quantize, **settings)
        self.rope_append = partial(rope.rope_append, **settings)
        multiprocessors = 4  # in Triton's interpreter
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._workspace = Workspace.allocate(device, num_programs)
        self.tensor_core_linear = TensorCoreLinear(device)

    def paged_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
        kv_scale: torch.Tensor,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        return paged_attention.paged_attention(
            q,
            k_cache,
            v_cache,
            block_tables,
            lengths,
            kv_scale,
            scale,
            self._workspace,
            pdl=self._pdl,
        )

    def prefill_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        blocks: torch.Tensor,
        first_position: int,
        kv_scale: float,
        scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """FlashAttention by torch, over keys and values that are gathered and widened; e4m3 numbers
        are exact in q's type, so their scale is put on the softmax and on the result."""
        num_rows, _, head_dim = q.shape
        end = first_position + num_rows
        k, v = (_widen(cache, blocks, end, q.dtype) for cache in (k_cache, v_cache))
        inputs = q.transpose(0, 1)[None], k[None], v[None]
        softmax_scale = head_dim**-0.5 * kv_scale
        if q.device.type == "cuda" and not self._use_cudnn:
            # Causal here means that the last query sees the last key, however many there are.
            attended = torch.ops.aten._scaled_dot_product_flash_attention(
                *inputs, is_causal=True, scale=softmax_scale
            )[0]
        else:
            attended = nn.functional.scaled_dot_product_attention(
                *inputs,
                attn_mask=causal_lower_right(num_rows, end),
                scale=softmax_scale,
                enable_gqa=True,
            )
        rows = attended[0].transpose(0, 1).reshape(num_rows, -1)  # [T, heads * head_dim]
        if scale is None:
            return rows * kv_scale
        return scale_quantize(rows.contiguous(), kv_scale, scale)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return self.tensor_core_linear(
            x, weight, scale, bias, dtype, use_fast_accum=self._use_fast_accum
        )

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    def streaming_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return streaming_linear.streaming_linear(x, weight, scale, bias, dtype, self._workspace)


def _widen(
    cache: torch.Tensor, blocks: torch.Tensor, length: int, dtype: torch.dtype
) -> torch.Tensor:
    """Positions below `length` on `blocks`, without their scale: [kv_heads, length, head_dim]."""
    _, kv_heads, block_size, head_dim = cache.shape
    pages = cache.view(torch.uint8)[blocks].view(cache.dtype)
    wide = pages.new_empty(kv_heads, len(blocks), block_size, head_dim, dtype=dtype)
    wide.copy_(pages.transpose(0, 1))
    return wide.flatten(1, 2)[:, :length]
