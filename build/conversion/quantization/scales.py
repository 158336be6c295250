"""From largest magnitudes to the scales of a layer's linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from build.conversion.quantization.quantization_error import quantization_error
from build.conversion.report.quantization_report import LinearReport
from nvlm.formats.tensor_names import SHARED_SCALE_LINEARS
from nvlm.model import fp8


def report_linears(
    prefix: str,
    weights: Mapping[str, torch.Tensor],
    weight_amax: Mapping[str, float],
    input_amax: Mapping[str, float],
    rows: Callable[[str], torch.Tensor],
) -> list[LinearReport]:
    """One row for each of `weights`, by name without `prefix`; `rows(name)` are inputs of it."""
    result = []
    for name, weight in weights.items():
        shared = SHARED_SCALE_LINEARS if name in SHARED_SCALE_LINEARS else (name,)
        weight_scale = fp8.scale_from_amax(max(weight_amax[n] for n in shared))
        input_scale = fp8.scale_from_amax(max(input_amax[n] for n in shared))
        x = rows(name)
        error = quantization_error(x, weight, input_scale, weight_scale)
        result.append(
            LinearReport(
                prefix + name,
                weight_amax[name],
                input_amax[name],
                weight_scale,
                input_scale,
                **asdict(error),
                num_rows=len(x),
            )
        )
    return result
