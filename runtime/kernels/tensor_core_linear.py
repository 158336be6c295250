"""FP8 tensor-core products by cuBLASLt."""

from __future__ import annotations

import os

import torch

from runtime.kernels.spare_rows import with_spare_rows

_MIN_ROWS = 8  # fewer take longer

_NO_WORKSPACE = {"CUBLASLT_WORKSPACE_SIZE": "0", "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
"""What torch reads before a process's first product. Without a workspace cuBLAS neither splits the
sum of few rows, which an H200 pays with a second kernel, nor clears a counter before each product
of many (docs/decisions.md)."""


class TensorCoreLinear:
    """x @ weight.T * scale + bias for any number of rows. x: [T, K], weight: [N, K], e4m3.

    To be made before the process's first product on a GPU, whose workspace it chooses, unless the
    user's environment does."""

    def __init__(self, device: torch.device) -> None:
        for name, value in _NO_WORKSPACE.items():
            os.environ.setdefault(name, value)
        self._one = torch.ones((), device=device)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        use_fast_accum: bool = False,
    ) -> torch.Tensor:
        """Sums leave the tensor cores every 128 products, with fast accumulation at the end."""
        num_rows = len(x)
        y = torch._scaled_mm(
            x if num_rows >= _MIN_ROWS else with_spare_rows(x, _MIN_ROWS),
            weight.t(),
            scale,
            self._one,
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=use_fast_accum,
        )
        return y[:num_rows]
