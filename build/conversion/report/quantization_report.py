"""What calibration and quantisation saw: rows of quantization_report.json."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nvlm.formats import layout
from nvlm.formats.scale_dtype import SCALE_DTYPE
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import ACTIVATION_SCALE, FP8, WEIGHT_SCALE, LinearScales
from nvlm.program.errors import UserError, shown
from nvlm.program.json_files import read_json_object, write_json_atomically

_LARGEST = float(torch.finfo(torch.float32).max)
SCALE_ROUNDING = 1 / 64
"""Of a scale to the numbers of a dtype, the widest of which are a 128th apart."""


@dataclass(frozen=True, slots=True)
class LinearReport:
    """A linear's largest magnitudes, its scales, and what its number format does to it.

    The errors are relative 2-norms: `weight_error` of the dequantised weight, `output_error` of
    what the quantised linear computes for `num_rows` rows of the calibration data, against the
    linear in the checkpoint's dtype. Shares are of the values in those rows: clipped at the largest
    number, and not zero but quantised to zero.
    """

    linear: str
    weight_amax: float
    input_amax: float
    scales: LinearScales
    weight_error: float
    output_error: float
    clipped_share: float
    underflow_share: float
    num_rows: int

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
        _check_count(rest, "num_rows")
        scales = LinearScales(rest.pop(WEIGHT_SCALE), rest.pop(ACTIVATION_SCALE))
        return cls(scales=scales, **rest)


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Largest magnitudes of Q and K after bias and RoPE, and of V after bias."""

    layer: str
    q_amax: float
    k_amax: float
    v_amax: float

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> AttentionReport:
        """Raises `ValueError` and its kin for values that no layer has."""
        rest = dict(row)
        scale = rest.pop("kv_cache_scaling_factor")
        _check_name(rest["layer"])
        _check_numbers(rest["layer"], rest, ("q_amax", "k_amax", "v_amax"))
        _check_numbers(rest["layer"], row, ("kv_cache_scaling_factor",))
        found = cls(**rest)
        _check_scale(
            f"kv_cache_scaling_factor of {found.layer}", scale, found.kv_cache_scaling_factor
        )
        return found

    @property
    def kv_cache_scaling_factor(self) -> float:
        """Covers Q too: the FP8 context kernel quantises Q with the cache's one scale."""
        return FP8.scale_from_amax(max(self.q_amax, self.k_amax, self.v_amax))


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Rows in the order of the model. scale_dtype: what the linears' scales are numbers of."""

    num_samples: int
    num_skipped: int
    linears: tuple[LinearReport, ...]
    attentions: tuple[AttentionReport, ...]
    scale_dtype: str

    def rows_of(self, prefix: str) -> tuple[list[LinearReport], AttentionReport]:
        """The rows of one decoder layer. Raises `UserError` if the report knows no such layer."""
        attentions = [row for row in self.attentions if row.layer.startswith(prefix)]
        linears = self.linears_of(prefix)
        if len(attentions) != 1 or not linears:
            raise UserError(f"--calib_cache has no {prefix[:-1]}: it is of another model")
        return linears, attentions[0]

    def linears_of(self, prefix: str) -> list[LinearReport]:
        return [row for row in self.linears if row.linear.startswith(prefix)]

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
                "attention": [
                    {**asdict(row), "kv_cache_scaling_factor": row.kv_cache_scaling_factor}
                    for row in self.attentions
                ],
            },
        )

    @classmethod
    def read(cls, path: Path) -> QuantizationReport:
        """Raises `UserError` for a file that no conversion of this version wrote."""
        advice = f"give the {layout.REPORT} of an earlier conversion as --calib_cache"
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


def as_record(
    linears: list[LinearReport], attention: AttentionReport | None = None
) -> dict[str, Any]:
    """What the journal keeps of a layer."""
    return {
        "linears": [row.to_json() for row in linears],
        "attention": None if attention is None else asdict(attention),
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
        tuple(AttentionReport(**row) for row in attentions),
        scale_dtype,
    )
