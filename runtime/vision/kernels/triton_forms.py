"""The functions of `plain_forms` as Triton kernels and cuBLASLt."""

from __future__ import annotations

from functools import partial

import torch

from runtime.kernels.quantization import scale_quantize
from runtime.kernels.tensor_core_linear import TensorCoreLinear
from runtime.vision.kernels import elementwise, embeddings, merging


class TritonForms:
    cut_patches = staticmethod(embeddings.cut_patches)
    embed = staticmethod(embeddings.embed)
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    normalize_qk = staticmethod(elementwise.normalize_qk)
    gelu = staticmethod(elementwise.gelu)
    add_merge_norm = staticmethod(merging.add_merge_norm)

    def __init__(self, device: torch.device) -> None:
        self.fp8_linear = partial(TensorCoreLinear(device), use_fast_accum=True)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale_quantize(x.contiguous(), 1.0, scale)
