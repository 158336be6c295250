"""The steps of `plain_forms` as Triton kernels and cuBLASLt."""

from __future__ import annotations

import torch

from runtime.kernels.fp8_linear import Fp8Linear
from runtime.kernels.quantization import quantize_tensor
from runtime.kernels.tensor_core_linear import TensorCoreLinear
from runtime.vision.kernels import elementwise, embeddings, merging
from runtime.vision.kernels.plain_forms import PlainForms


class TritonForms(PlainForms):
    cut_patches = staticmethod(embeddings.cut_patches)
    embed = staticmethod(embeddings.embed)
    add_rms_norm = staticmethod(elementwise.add_rms_norm)
    normalize_qk = staticmethod(elementwise.normalize_qk)
    gelu = staticmethod(elementwise.gelu)
    add_merge_norm = staticmethod(merging.add_merge_norm)

    def __init__(self, device: torch.device) -> None:
        self._tensor_core_linear = TensorCoreLinear(device)

    def quantize(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return quantize_tensor(x.contiguous(), scale)

    def linear(self, x: torch.Tensor, linear: Fp8Linear, dtype: torch.dtype) -> torch.Tensor:
        return self._tensor_core_linear(x, linear, dtype, use_fast_accum=True)
