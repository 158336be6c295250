"""A report that somebody changed is refused as --calib_cache, whatever was changed in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from build.conversion.convert import ConvertOptions, convert
from build.conversion.report.quantization_report import QuantizationReport
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from nvlm.program.errors import UserError

CPU = torch.device("cpu")
BAD = [float("nan"), -1, 1e30, True, "1", None, [], {}, float("inf"), 10**400]
LINEAR = (
    *("weight_amax", "input_amax", "weight_error", "output_error", "clipped_share"),
    *("underflow_share", "num_rows", "weights_scaling_factor", "activation_scaling_factor"),
)
ATTENTION = ("q_amax", "k_amax", "v_amax", "kv_cache_scaling_factor")


@pytest.fixture
def report(checkpoint_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((checkpoint_dir / layout.REPORT).read_text())
    return values


def refused(values: Any, folder: Path) -> str:
    path = folder / "changed.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        QuantizationReport.read(path)
    return str(error.value)


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:8])
def test_a_value_that_no_report_has_is_refused(
    report: dict[str, Any], tmp_path: Path, value: Any
) -> None:
    for section, names in (("linears", LINEAR), ("attention", ATTENTION)):
        for name in names:
            if value == 1e30 and name not in ("clipped_share", "underflow_share", "num_rows"):
                continue  # a number that stands for itself; its scale shows it (below)
            row = report[section][0]
            changed = {**report, section: [{**row, name: value}, *report[section][1:]]}
            assert len(refused(changed, tmp_path)) < 700, name


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", [1.0]])
def test_an_error_that_no_part_has_is_refused(
    report: dict[str, Any], tmp_path: Path, value: Any
) -> None:
    """Those that older versions did not measure may be missing, and are numbers where they are."""
    measured = ("residual_error", "own_scales_residual_error", "v_error", "v_own_scale_error")
    for section, names in (("linears", ("residual_error",)), ("attention", measured)):
        row = report[section][0]
        for name in names:
            changed = {**report, section: [{**row, name: value}, *report[section][1:]]}
            assert name in refused(changed, tmp_path)
            changed[section][0] = {**row, name: None}
            (tmp_path / "changed.json").write_text(json.dumps(changed))
            QuantizationReport.read(tmp_path / "changed.json")
    row = report["attention"][0]
    for name in ("q_head_amax", "k_head_amax", "v_head_amax"):
        heads = [*row[name][:-1], value]
        changed = {**report, "attention": [{**row, name: heads}, *report["attention"][1:]]}
        assert name in refused(changed, tmp_path)


@pytest.mark.parametrize("value", [None, 3, "x", [3], ["x"], [[]], {"a": 1}, [{}]])
def test_a_section_of_another_form_is_refused(
    report: dict[str, Any], tmp_path: Path, value: Any
) -> None:
    for section in ("linears", "attention"):
        refused({**report, section: value}, tmp_path)
    for name in ("linear", "layer") if value != "x" else ():
        section = "linears" if name == "linear" else "attention"
        refused({**report, section: [{**report[section][0], name: value}]}, tmp_path)


def test_two_rows_of_one_linear_are_refused(report: dict[str, Any], tmp_path: Path) -> None:
    twice = [*report["linears"], report["linears"][0]]
    assert "2 rows" in refused({**report, "linears": twice}, tmp_path)


@pytest.mark.parametrize("part", ["transformer.", "vision"])
@pytest.mark.parametrize("name", ["weight_amax", "input_amax"])
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, 1e20])
def test_an_amax_that_is_not_its_scales_is_refused(
    model_dir: Path,
    report: dict[str, Any],
    tmp_path: Path,
    part: str,
    name: str,
    factor: float,
) -> None:
    """One row is changed: a linear that shares its scale may have any smaller amax of its input."""
    rows = [row for row in report["linears"] if row["linear"].startswith(part)]
    row = next(row for row in rows if "dense" in row["linear"] or "proj" in row["linear"])
    row[name] *= factor
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(report))
    source = HuggingFaceSource(model_dir)
    with pytest.raises(UserError, match="--calib_cache"):
        convert(source, tmp_path / "new", ConvertOptions(calib_cache=path), CPU)
    assert [each.name for each in tmp_path.iterdir()] in (
        ["cache.json"],
        ["cache.json", "new.partial"],
        ["new.partial", "cache.json"],
    )


def test_vision_rows_of_other_weights_are_refused(
    model_dir: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    """Amax and scale changed together: only the weights show it."""
    row = next(row for row in report["linears"] if row["linear"].startswith("vision"))
    row["weight_amax"] *= 2
    row["weights_scaling_factor"] *= 2
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(report))
    source = HuggingFaceSource(model_dir)
    with pytest.raises(UserError, match=r"--calib_cache is of other weights .* vision"):
        convert(source, tmp_path / "new", ConvertOptions(calib_cache=path), CPU)
