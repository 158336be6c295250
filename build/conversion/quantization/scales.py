"""From largest magnitudes to the scales of a layer's linears."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch

from build.conversion.quantization.quantization_error import quantization_error
from build.conversion.report.quantization_report import SCALE_ROUNDING, LinearReport
from nvlm.model.decoder import SHARED_SCALE_LINEARS
from nvlm.model.number_formats import LinearScales, NumberFormat
from nvlm.program.errors import UserError


def report_linears(
    prefix: str,
    weights: Mapping[str, torch.Tensor],
    weight_amax: Mapping[str, float],
    input_amax: Mapping[str, float],
    rows: Callable[[str], torch.Tensor],
    number_format: NumberFormat,
    dtype: torch.dtype,
) -> list[LinearReport]:
    """One row for each of `weights`, by name without `prefix`; `rows(name)` are inputs of it."""
    scales = _scales(weight_amax, input_amax, number_format, dtype)
    result = []
    for name, weight in weights.items():
        x = rows(name)
        error = quantization_error(x, weight, number_format, scales[name])
        result.append(
            LinearReport(
                prefix + name,
                weight_amax[name],
                input_amax[name],
                scales[name],
                **asdict(error),
                num_rows=len(x),
            )
        )
    return result


def scaled_anew(
    prefix: str,
    names: Sequence[str],
    cached: list[LinearReport],
    number_format: NumberFormat,
    dtype: torch.dtype,
) -> list[LinearReport]:
    """A layer's rows of --calib_cache with the scales that a calibration would give now.

    names: of the layer's linears, without `prefix`.

    Their amax are kept. An older version stored float32 scales, and --dtype may be another one.
    Raises `UserError` for an input that `dtype` does not hold, or where a row is missing.
    """
    rows = {row.linear.removeprefix(prefix): row for row in cached}
    if missing := sorted(set(names) - rows.keys()):
        raise UserError(
            f"--calib_cache has no row {prefix}{missing[0]}, expected one for each linear of the "
            "model; give the report of a finished conversion"
        )
    if unknown := sorted(rows.keys() - set(names)):
        raise UserError(
            f"--calib_cache has a row {prefix}{unknown[0]}, which the model has not; give the "
            "report of a conversion of this model"
        )
    for row in cached:
        if row.input_amax > torch.finfo(dtype).max:
            raise UserError(
                f"--calib_cache overflows --dtype at {row.linear} ({row.input_amax}); use --dtype "
                "bfloat16 or float32"
            )
    weight_amax = {name: row.weight_amax for name, row in rows.items()}
    input_amax = {name: row.input_amax for name, row in rows.items()}
    scales = _scales(weight_amax, input_amax, number_format, dtype)
    for name, row in rows.items():
        _check_scales(row, scales[name])
    return [replace(row, scales=scales[name]) for name, row in rows.items()]


def _check_scales(row: LinearReport, expected: LinearScales) -> None:
    """Refuses amax that are not those of the row's own scales: somebody changed one of them."""
    pairs = ((row.scales.weight, expected.weight), (row.scales.activation, expected.activation))
    for found, wanted in pairs:
        if not math.isclose(found, wanted, rel_tol=SCALE_ROUNDING):
            raise UserError(
                f"--calib_cache has a scale {found:g} at {row.linear}, expected {wanted:g} by its "
                "amax; give the report as the conversion wrote it"
            )


def check_cached(report: LinearReport, amax: float) -> None:
    """Refuses a row of --calib_cache whose weight is not the one that is converted."""
    if amax != report.weight_amax:
        raise UserError(
            f"--calib_cache is of other weights or another --dtype: {report.linear} has amax "
            f"{amax}, the cache says {report.weight_amax}; calibrate again"
        )


def _scales(
    weight_amax: Mapping[str, float],
    input_amax: Mapping[str, float],
    number_format: NumberFormat,
    dtype: torch.dtype,
) -> dict[str, LinearScales]:
    """The scales of each of a layer's linears, by name."""
    result = {}
    for name in weight_amax:
        shared = SHARED_SCALE_LINEARS if name in SHARED_SCALE_LINEARS else (name,)
        result[name] = number_format.scales_from_amax(
            max(weight_amax[n] for n in shared), max(input_amax[n] for n in shared), dtype
        )
    return result
