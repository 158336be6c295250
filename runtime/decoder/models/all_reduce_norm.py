"""What a row-parallel linear ends with: the sum over ranks, residual, RMSNorm, quantise."""

from __future__ import annotations

from typing import Protocol

import torch

from nvlm.model.decoder import AllReduce
from runtime.decoder.kernels.operands import Norm
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.kernels.fp8_linear import Fp8Linear


class AllReduceNorm(Protocol):
    def linear_add_rms_norm(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        hidden: torch.Tensor,
        norm: Norm,
        scale: torch.Tensor | None,
        following: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden + the linear of x, added over ranks, and its RMSNorm, e4m3 if a scale is given:
        two [T, hidden_size]. Float32 sums of several ranks are rounded once, after they are added.

        The first is for the next call alone: it may hold one rank's rows. x: e4m3 [T, a rank's
        columns]. following: the weight that is read next, for which the memory has time here.
        """
        ...


class OneRank:
    """`AllReduceNorm` of a model that is whole. dtype: the model's."""

    def __init__(self, forms: PlainForms, dtype: torch.dtype) -> None:
        self._forms, self._dtype = forms, dtype

    def linear_add_rms_norm(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        hidden: torch.Tensor,
        norm: Norm,
        scale: torch.Tensor | None,
        following: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        added = self._forms.linear(x, linear, self._dtype)
        return self._forms.add_rms_norm(hidden, added, norm, scale)


class CollectiveAllReduceNorm:
    """`AllReduceNorm` by a library's sum over ranks: NCCL's, gloo's."""

    def __init__(self, forms: PlainForms, all_reduce: AllReduce) -> None:
        self._forms, self._all_reduce = forms, all_reduce

    def linear_add_rms_norm(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        hidden: torch.Tensor,
        norm: Norm,
        scale: torch.Tensor | None,
        following: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert linear.bias is None, "every rank would add it"
        added = self._all_reduce(self._forms.linear(x, linear, torch.float32))
        return self._forms.add_rms_norm(hidden, added, norm, scale)
