"""FP8 tensor-core products by cuBLASLt."""

from __future__ import annotations

import torch

from runtime.kernels.fp8_linear import Fp8Linear
from runtime.kernels.spare_rows import with_spare_rows

_MIN_ROWS = 8  # fewer take longer


class TensorCoreLinear:
    """x @ weight.T * scale + bias for any number of rows. x: [T, in_features] e4m3.

    As fast as the memory only where the process has set up cuBLAS (nvlm/program/process.py)."""

    def __init__(self, device: torch.device) -> None:
        self._one = torch.ones((), device=device)

    def __call__(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        dtype: torch.dtype,
        out: torch.Tensor | None = None,
        *,
        use_fast_accum: bool = False,
    ) -> torch.Tensor:
        """Sums leave the tensor cores every 128 products, with fast accumulation at the end. out:
        [T, out_features] of `dtype`, where the result must be, with room for 8 rows."""
        num_rows = len(x)
        if num_rows == 0:
            return x.new_empty(0, len(linear.weight), dtype=dtype)
        if num_rows < _MIN_ROWS:
            x = with_spare_rows(x, _MIN_ROWS)
            out = None if out is None else with_spare_rows(out, _MIN_ROWS)
        y = torch._scaled_mm(
            x,
            linear.weight.t(),
            linear.scale,
            self._one,
            bias=linear.bias,
            out_dtype=dtype,
            use_fast_accum=use_fast_accum,
            out=out,
        )
        return y[:num_rows]
