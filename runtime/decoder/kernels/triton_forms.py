"""The steps of `plain_forms` as Triton kernels and libraries' calls, bound to one device's
workspace."""

from __future__ import annotations

import torch
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from runtime.decoder.kernels import (
    chunk_attention,
    decode_attention,
    elementwise,
    gate_up_swiglu,
    rope,
)
from runtime.decoder.kernels.operands import ChunkTiles, KVPages, TokenRows
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.kernels.widen_pages import widen_pages
from runtime.decoder.kernels.workspace import Workspace
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.kernels.load_ahead import LoadAhead
from runtime.kernels.quantization import scale_quantize
from runtime.kernels.spare_rows import with_spare_rows
from runtime.kernels.tensor_core_linear import TensorCoreLinear

_PROGRAMS_PER_MULTIPROCESSOR = 2
_PLANNED_ROWS = 256  # cuDNN plans multiples of so many rows for a prompt's attention
_FAST_ROWS = 128  # up to which the memory takes a linear's time (docs/decisions/decoder.md, 57)


class TritonForms(PlainForms):
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    rope_append = staticmethod(rope.rope_append)

    def __init__(self, device: torch.device) -> None:
        self._device = device
        multiprocessors = 4  # in Triton's interpreter
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._workspace = Workspace.allocate(device, num_programs)
        # Chunks are attended beside rows that decode.
        self._chunk_workspace = Workspace.allocate(device, num_programs)
        self.tensor_core_linear = TensorCoreLinear(device)
        self._ahead = LoadAhead(device)

    def linear(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.tensor_core_linear(x, linear, dtype, out, use_fast_accum=len(x) > _FAST_ROWS)

    def gate_up_swiglu(
        self, x: torch.Tensor, gate_up: Fp8Linear, down: Fp8Linear, dtype: torch.dtype
    ) -> torch.Tensor:
        if len(x) <= gate_up_swiglu.MAX_ROWS:
            return gate_up_swiglu.gate_up_swiglu(x, gate_up, down, dtype, self._workspace)
        halves = self.linear(x, gate_up, dtype)
        return elementwise.swiglu_quantize(halves, down.activation_scale)

    def decode_attention(
        self,
        qkv: torch.Tensor,
        rows: TokenRows,
        block_tables: torch.Tensor,
        positions: torch.Tensor,
        pages: KVPages,
        scale: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return decode_attention.decode_attention(
            qkv, rows, block_tables, positions, pages, scale, self._workspace, out=out
        )

    def chunk_attention(
        self,
        q: torch.Tensor,
        tiles: ChunkTiles,
        block_tables: torch.Tensor,
        pages: KVPages,
        scale: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        chunk_attention.chunk_attention(
            q, tiles, block_tables, pages, scale, out, self._chunk_workspace
        )

    def prefill_attention(
        self,
        q: torch.Tensor,
        pages: KVPages,
        blocks: torch.Tensor,
        scale: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """By torch, over keys and values that are gathered and widened; stored numbers are exact in
        q's type, so their scales are put on the softmax and on the result. Prompts are given so
        many rows more that there are few shapes to plan."""
        num_rows, heads, head_dim = q.shape
        num_positions = -(-num_rows // _PLANNED_ROWS) * _PLANNED_ROWS
        k, v = widen_pages(pages, blocks, num_rows, num_positions, q.dtype)
        softmax_scale = head_dim**-0.5 * pages.k_factor
        attended = _attend_whole(with_spare_rows(q, num_positions), k, v, softmax_scale)
        rows = attended[0, :, :num_rows].transpose(0, 1).reshape(num_rows, heads * head_dim)
        if scale is None:
            return torch.mul(rows, pages.v_factor, out=out)
        return scale_quantize(rows.contiguous(), pages.v_factor, scale, out)

    def plan_prefill_attention(
        self, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, max_num_tokens: int
    ) -> None:
        for num_rows in range(_PLANNED_ROWS, max_num_tokens + _PLANNED_ROWS, _PLANNED_ROWS):
            q = torch.zeros(num_rows, heads, head_dim, dtype=dtype, device=self._device)
            k, v = torch.zeros(2, kv_heads, num_rows, head_dim, dtype=dtype, device=self._device)
            _attend_whole(q, k, v, 1.0)

    def load_ahead(self, weight: torch.Tensor) -> None:
        self._ahead.start(weight)

    def join_ahead(self) -> None:
        self._ahead.join()

    def head(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _attend_whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [T, heads, head_dim] over k and v [kv_heads, T, head_dim], causal: [1, heads, T, head_dim].

    cuDNN's kernel is the fastest. It plans each shape, strides and thread anew, for some 60 ms.
    Where it is missing, switched off or does not take these heads, torch chooses another one. It is
    called by name, since `sdpa_kernel` would choose for vision's thread too.
    """
    inputs = q.transpose(0, 1)[None], k[None], v[None]
    if can_use_cudnn_attention(SDPAParams(*inputs, None, 0.0, True, True)):
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            *inputs, attn_bias=None, compute_log_sumexp=False, is_causal=True, scale=scale
        )[0]
    return nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, scale=scale, enable_gqa=True
    )
