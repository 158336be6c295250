"""The functions of `plain_forms` as Triton kernels, bound to one device's workspace."""

from __future__ import annotations

import torch

from runtime.decoder.kernels import elementwise, paged_attention, rope, streaming_linear
from runtime.decoder.kernels.workspace import Workspace

_PROGRAMS_PER_MULTIPROCESSOR = 2


class TritonForms:
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    swiglu_quantize = staticmethod(elementwise.swiglu_quantize)
    rope_append = staticmethod(rope.rope_append)

    def __init__(self, device: torch.device) -> None:
        multiprocessors = 4  # in Triton's interpreter
        if device.type == "cuda":
            multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        num_programs = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
        self._workspace = Workspace.allocate(device, num_programs)
        self._one = torch.ones((), device=device)

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
            q, k_cache, v_cache, block_tables, lengths, kv_scale, scale, self._workspace
        )

    def streaming_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return streaming_linear.streaming_linear(x, weight, scale, bias, dtype, self._workspace)

    def tensor_core_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """cuBLASLt, for any number of rows; sums leave the tensor cores every 128 products."""
        return torch._scaled_mm(
            x, weight.t(), scale, self._one, bias=bias, out_dtype=dtype, use_fast_accum=False
        )
