"""What calibration and quantisation saw: rows of quantization_report.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from nvlm.formats import layout
from nvlm.formats.scale_dtype import SCALE_DTYPE
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import ACTIVATION_SCALE, FP8, WEIGHT_SCALE, LinearScales
from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import read_json_object, write_json_atomically

NOTABLY_MORE = 1.25
"""Times the rounding error of V with a scale of its own, from where on a warning is given."""
SCALE_ROUNDING = 1 / 64
"""Relative rounding of a scale to a dtype, whose widest numbers are a 128th apart."""
_KV_SCALE = "kv_cache_scaling_factor"
_BY_HEAD = ("q_head_amax", "k_head_amax", "v_head_amax")
_MEASURED = ("residual_error", "own_scales_residual_error", "v_error", "v_own_scale_error")
_LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, slots=True)
class LinearReport:
    """A linear's largest magnitudes, its scales, and what its number format does to it.

    Errors are relative 2-norms. Shares are of the input's values in the calibration data, 0 to 1.
    """

    linear: str  # its name in the model
    weight_amax: float  # largest magnitude of the weight
    input_amax: float  # largest magnitude of the input, over the calibration data
    scales: LinearScales  # as stored
    weight_error: float  # of the dequantised weight
    # Of what the quantised linear computes, against the linear in the checkpoint's dtype.
    output_error: float
    clipped_share: float  # clipped at the largest number
    underflow_share: float  # not zero, but quantised to zero
    num_rows: int  # rows of the calibration data that `output_error` is over
    # Of the layer's output, the residual stream, where this linear alone is quantised. None: the
    # head, or made by an older version.
    residual_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat row, the scales under their names in a checkpoint."""
        row: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            row |= value.to_json() if isinstance(value, LinearScales) else {field.name: value}
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> LinearReport:
        """Raises `ValueError` and its kin for values that no linear has."""
        rest = dict(row)
        _check_name(rest["linear"])
        _check_numbers(
            rest["linear"], rest, ("weight_amax", "input_amax", WEIGHT_SCALE, ACTIVATION_SCALE)
        )
        _check_numbers(rest["linear"], rest, ("weight_error", "output_error"))
        _check_numbers(rest["linear"], rest, ("clipped_share", "underflow_share"), most=1.0)
        if rest.get("residual_error") is not None:  # older versions did not measure it
            _check_numbers(rest["linear"], rest, ("residual_error",))
        _check_count(rest, "num_rows")
        scales = LinearScales(rest.pop(WEIGHT_SCALE), rest.pop(ACTIVATION_SCALE))
        return cls(scales=scales, **rest)


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Largest magnitudes of Q and K after bias and RoPE, and of V after bias; also by head.

    Errors are relative 2-norms, None in the report of an older version.
    """

    layer: str  # its name in the model
    q_amax: float  # of all heads
    k_amax: float  # of all heads
    v_amax: float  # of all heads
    q_head_amax: tuple[float, ...] = ()  # of each head; empty in the report of an older version
    k_head_amax: tuple[float, ...] = ()  # of each head; empty as above
    v_head_amax: tuple[float, ...] = ()  # of each head; empty as above
    # Of the layer's output where the KV cache alone is quantised, K and V by the one scale.
    residual_error: float | None = None
    own_scales_residual_error: float | None = None  # the same with K and V each by its own scale
    v_error: float | None = None  # of V itself by the one scale
    v_own_scale_error: float | None = None  # of V itself by its own scale

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> AttentionReport:
        """Raises `ValueError` and its kin for values that no layer has."""
        rest = dict(row)
        name, scale = rest["layer"], rest.pop(_KV_SCALE)
        _check_name(name)
        _check_numbers(name, row, ("q_amax", "k_amax", "v_amax", _KV_SCALE))
        _check_numbers(name, row, [key for key in _MEASURED if row.get(key) is not None])
        for key in _BY_HEAD:
            rest[key] = tuple(row.get(key, ()))
            for value in rest[key]:
                _check_numbers(name, {key: value}, [key])
        found = cls(**rest)
        _check_scale(f"{_KV_SCALE} of {name}", scale, found.kv_cache_scaling_factor)
        return found

    @property
    def kv_cache_scaling_factor(self) -> float:
        """Covers Q too: the FP8 context kernel quantises Q with the cache's one scale."""
        return FP8.scale_from_amax(max(self.q_amax, self.k_amax, self.v_amax))

    @property
    def takes_resolution(self) -> bool:
        """Whether the one scale, which K or Q asks for, rounds V notably more than V's own."""
        if self.v_error is None or self.v_own_scale_error is None:
            return False
        return self.v_error > NOTABLY_MORE * self.v_own_scale_error

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), _KV_SCALE: self.kv_cache_scaling_factor}


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """What a conversion measured, in the order of the model."""

    num_samples: int  # of calibration
    num_skipped: int  # samples whose images could not all be read
    linears: tuple[LinearReport, ...]  # a row a quantised linear
    attentions: tuple[AttentionReport, ...]  # a row a layer
    scale_dtype: str  # what the linears' scales are numbers of

    def rows_of(self, prefix: str) -> tuple[list[LinearReport], AttentionReport]:
        """The rows of one decoder layer. Raises `UserError` if the report knows no such layer."""
        attentions = [row for row in self.attentions if row.layer.startswith(prefix)]
        linears = self.linears_of(prefix)
        if len(attentions) != 1 or not linears:
            raise UserError(
                f"--calib_cache has no {prefix[:-1]}: it is of another model; give the report of "
                "these weights"
            )
        return linears, attentions[0]

    def linears_of(self, prefix: str) -> list[LinearReport]:
        return [row for row in self.linears if row.linear.startswith(prefix)]

    def warning(self) -> str | None:
        """A line about layers whose K or Q takes V's resolution, the worst named; None without."""
        found = [row for row in self.attentions if row.takes_resolution]
        if not found:
            return None
        worst = max(found, key=lambda row: row.v_error or 0.0)
        others = f" and {len(found) - 1} more layers" if len(found) > 1 else ""
        return (
            f"{worst.layer}{others}: Q's amax {worst.q_amax:.4g} and K's {worst.k_amax:.4g} take "
            f"resolution from V's {worst.v_amax:.4g} in an FP8 KV cache of one scale: V is "
            f"{worst.v_error:.1%} off, {worst.v_own_scale_error:.1%} with a scale of its own; "
            "compare answers with those of --kv_cache_quant_algo none"
        )

    @property
    def worst_first(self) -> list[LinearReport]:
        return sorted(self.linears, key=lambda row: -row.output_error)

    def write(self, path: Path) -> None:
        write_json_atomically(
            path,
            {
                "num_calibration_samples": self.num_samples,
                "num_skipped": self.num_skipped,
                "scale": f"amax / {FP8.largest:.0f}, of linears rounded up to scale_dtype",
                SCALE_DTYPE: self.scale_dtype,
                "linears": [row.to_json() for row in self.worst_first],
                "attention": [row.to_json() for row in self.attentions],
            },
        )

    @classmethod
    def read(cls, path: Path, flag: str = "--calib_cache") -> QuantizationReport:
        """Raises `UserError` for a file that no conversion of this version wrote."""
        advice = f"give the {layout.REPORT} of an earlier conversion as {flag}"
        try:
            values = read_json_object(path)
        except UserError as error:
            raise UserError(f"{error}; {advice}") from None
        try:
            attentions = tuple(map(AttentionReport.from_json, values["attention"]))
            linears = tuple(map(LinearReport.from_json, values["linears"]))
            _check_once([row.linear for row in linears])
            _check_once([row.layer for row in attentions])
            for key in ("num_calibration_samples", "num_skipped"):
                _check_count(values, key)
            scale_dtype = values.get(SCALE_DTYPE, "float32")  # older versions did not say it
            if scale_dtype not in TORCH_DTYPES:
                raise ValueError(f"{SCALE_DTYPE} is {shown(scale_dtype)}")
            return cls(
                values["num_calibration_samples"],
                values["num_skipped"],
                linears,
                attentions,
                scale_dtype,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path} is no quantization report of this version ({shown(error)}); {advice}"
            ) from None


def _check_name(value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"a row is named {shown(value)}")


def _check_once(names: list[str]) -> None:
    for name, number in Counter(names).items():
        if number > 1:
            raise ValueError(f"{shown(name)} has {number} rows")


def _check_numbers(
    name: str, row: Mapping[str, Any], keys: Iterable[str], most: float = _LARGEST
) -> None:
    """Raises `ValueError` for what is no magnitude."""
    for key in keys:
        value = row[key]
        if type(value) not in (int, float) or not 0 <= value <= most:  # NaN is neither
            raise ValueError(f"{key} of {name} is {shown(value)}")


def _check_count(row: Mapping[str, Any], key: str) -> None:
    if type(row[key]) is not int or not 0 <= row[key] < 1 << 53:
        raise ValueError(f"{key} is {shown(row[key])}")


def _check_scale(name: str, scale: float, expected: float) -> None:
    """Scales and amax of one report belong together. Older versions rounded scales otherwise."""
    if not math.isclose(scale, expected, rel_tol=SCALE_ROUNDING):
        raise ValueError(f"{name} is {shown(scale)}, expected {expected:g} of its amax")


def with_residual_errors(
    linears: Iterable[LinearReport], prefix: str, errors: Mapping[str, float]
) -> list[LinearReport]:
    """errors: by the linears' names without `prefix`."""
    return [replace(row, residual_error=errors[row.linear.removeprefix(prefix)]) for row in linears]


def as_record(
    linears: list[LinearReport], attention: AttentionReport | None = None
) -> dict[str, Any]:
    """What the journal keeps of a layer."""
    return {
        "linears": [row.to_json() for row in linears],
        "attention": None if attention is None else attention.to_json(),
    }


def from_records(
    records: list[dict[str, Any]], num_samples: int, num_skipped: int, scale_dtype: str
) -> QuantizationReport:
    attentions = [record["attention"] for record in records if record.get("attention")]
    return QuantizationReport(
        num_samples,
        num_skipped,
        tuple(
            LinearReport.from_json(row) for record in records for row in record.get("linears", [])
        ),
        tuple(AttentionReport.from_json(row) for row in attentions),
        scale_dtype,
    )
