"""The functions of `plain_forms` as Triton kernels and libraries' calls, bound to one device's
workspace."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from runtime.decoder.kernels import decode_attention, elementwise, gate_up_swiglu, rope
from runtime.decoder.kernels.widen_pages import widen_pages
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.quantization import scale_quantize
from runtime.kernels.spare_rows import with_spare_rows
from runtime.kernels.tensor_core_linear import TensorCoreLinear

_PROGRAMS_PER_MULTIPROCESSOR = 2
_PLANNED_ROWS = 256  # of a prompt's attention: cuDNN plans their multiples
_FAST_ROWS = 256  # of a linear. More than a decode step's, whose time is the memory's


class TritonForms:
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    rope_append = staticmethod(rope.rope_append)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        multiprocessors = 4  # in Triton's interpreter
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._workspace = Workspace.allocate(device, num_programs)
        self.tensor_core_linear = TensorCoreLinear(device)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return self.tensor_core_linear(
            x, weight, scale, bias, dtype, use_fast_accum=len(x) > _FAST_ROWS
        )

    def gate_up_swiglu(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        product_scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if len(x) <= gate_up_swiglu.MAX_ROWS:
            return gate_up_swiglu.gate_up_swiglu(
                x, weight, scale, product_scale, dtype, self._workspace
            )
        gate_up = self.linear(x, weight, scale, None, dtype)
        return elementwise.swiglu_quantize(gate_up, product_scale)

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
    ) -> torch.Tensor:
        return decode_attention.decode_attention(
            qkv,
            cos,
            sin,
            slots,
            k_cache,
            v_cache,
            block_tables,
            positions,
            kv_scale,
            scale,
            self._workspace,
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
        """By torch, over keys and values that are gathered and widened; e4m3 numbers are exact in
        q's type, so their scale is put on the softmax and on the result. cuDNN's kernel is the
        fastest and plans each new shape for some 60 ms: it takes whole prompts, as so many rows
        more that there are few shapes. FlashAttention needs no plan and takes the others."""
        num_rows, heads, head_dim = q.shape
        end = first_position + num_rows
        is_planned = q.device.type == "cuda" and first_position == 0 and num_rows >= _PLANNED_ROWS
        granularity = _PLANNED_ROWS if is_planned else k_cache.shape[2]
        num_positions = -(-end // granularity) * granularity
        k, v = widen_pages(k_cache, v_cache, blocks, end, num_positions, q.dtype)
        inputs = q.transpose(0, 1)[None], k[None, :, :end], v[None, :, :end]
        softmax_scale = head_dim**-0.5 * kv_scale
        if is_planned:
            rows = with_spare_rows(q, num_positions).transpose(0, 1)[None]
            attended = _attend_by_cudnn(rows, k[None], v[None], softmax_scale)
        elif q.device.type == "cuda":
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
        rows = attended[0, :, :num_rows].transpose(0, 1).reshape(num_rows, heads * head_dim)
        if scale is None:
            return rows * kv_scale
        return scale_quantize(rows.contiguous(), kv_scale, scale)

    def plan_prefill_attention(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, max_num_tokens: int
    ) -> None:
        for num_rows in range(_PLANNED_ROWS, max_num_tokens + _PLANNED_ROWS, _PLANNED_ROWS):
            q, k, v = (
                torch.zeros(1, n, num_rows, head_dim, dtype=dtype, device=self._device)
                for n in (heads, kv_heads, kv_heads)
            )
            rows = q.transpose(1, 2).contiguous().transpose(1, 2)  # as prefill_attention's lie
            _attend_by_cudnn(rows, k, v, 1.0)

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _attend_by_cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
