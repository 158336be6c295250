"""From largest magnitudes to the scales of a layer's linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch

from build.conversion.quantization.quantization_error import quantization_error
from build.conversion.report.quantization_report import LinearReport
from nvlm.model.decoder import SHARED_SCALE_LINEARS
from nvlm.model.number_formats import NumberFormat


def report_linears(
    prefix: str,
    weights: Mapping[str, torch.Tensor],
    weight_amax: Mapping[str, float],
    input_amax: Mapping[str, float],
    rows: Callable[[str], torch.Tensor],
    number_format: NumberFormat,
) -> list[LinearReport]:
    """One row for each of `weights`, by name without `prefix`; `rows(name)` are inputs of it."""
    result = []
    for name, weight in weights.items():
        shared = SHARED_SCALE_LINEARS if name in SHARED_SCALE_LINEARS else (name,)
        scales = number_format.scales_from_amax(
            max(weight_amax[n] for n in shared), max(input_amax[n] for n in shared)
        )
        x = rows(name)
        error = quantization_error(x, weight, number_format, scales)
        result.append(
            LinearReport(
                prefix + name,
                weight_amax[name],
                input_amax[name],
                scales,
                **asdict(error),
                num_rows=len(x),
            )
        )
    return result
