"""Calibration on any device: bounded attention scores, and a GPU's scales beside a CPU's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from build.conversion.calibration import calibrate_decoder
from build.conversion.convert import convert
from build.conversion.report.quantization_report import QuantizationReport
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats import layout
from tests.conftest import CPU, FP8, Workshop
from tests.support.tolerances import AMAX_AFTER_BF16, FLOAT32_ATTENTION, relative_error


def attention_float64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int
) -> torch.Tensor:
    """Row by row, head by head."""
    rows, heads, head_dim = q.shape
    group = heads // k.shape[1]
    result = torch.empty(rows, heads, head_dim, dtype=torch.float64)
    for row in range(rows):
        seen = first_position + row + 1
        for head in range(heads):
            keys, values = (x[:seen, head // group].double() for x in (k, v))
            scores = keys @ q[row, head].double() / head_dim**0.5
            result[row, head] = torch.softmax(scores, 0) @ values
    return result


@pytest.mark.parametrize("first_position", [0, 1, 19])
@pytest.mark.parametrize("rows_at_a_time", [1, 4, 13, 100])
def test_attention_in_blocks_is_attention(
    first_position: int, rows_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(7)
    rows, heads, kv_heads, head_dim = 13, 6, 2, 8
    length = first_position + rows
    q = torch.randn(rows, heads, head_dim, generator=generator)
    k, v = (torch.randn(length, kv_heads, head_dim, generator=generator) for _ in "kv")
    most: list[int] = []
    attend = calibrate_decoder.causal_attention

    def counted(q: torch.Tensor, *rest: object) -> torch.Tensor:
        most.append(len(q))
        return attend(q, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(calibrate_decoder, "causal_attention", counted)
    monkeypatch.setattr(calibrate_decoder, "_SCORE_BYTES", 4 * heads * length * rows_at_a_time)
    found = torch.cat(list(calibrate_decoder._in_blocks(q, k, v, first_position)))
    assert max(most) == min(rows_at_a_time, rows)
    expected = attention_float64(q, k, v, first_position)
    assert relative_error(found, expected) <= FLOAT32_ATTENTION


def report_of(checkpoint: Path) -> QuantizationReport:
    return QuantizationReport.read(checkpoint / layout.REPORT)


def assert_same_scales(found: QuantizationReport, expected: QuantizationReport) -> None:
    ours = {row.linear: row for row in found.linears}
    for row in expected.linears:
        assert ours[row.linear].weight_amax == row.weight_amax, "a maximum has no rounding"
        assert ours[row.linear].input_amax == pytest.approx(row.input_amax, rel=AMAX_AFTER_BF16)
    theirs = {row.layer: asdict(row) for row in expected.attentions}
    for attention in found.attentions:
        other = theirs[attention.layer]
        for name in ("q_amax", "k_amax", "v_amax"):
            assert getattr(attention, name) == pytest.approx(other[name], rel=AMAX_AFTER_BF16)


def test_windows_and_blocks_leave_the_scales(
    model_dir: Path, checkpoint_dir: Path, fresh: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples cut at every seventh token, attention three rows at a time."""
    monkeypatch.setattr(calibrate_decoder, "_ROWS_PER_WINDOW", 7)
    monkeypatch.setattr(calibrate_decoder, "_SCORE_BYTES", 4 * 4 * 60 * 3)
    convert(HuggingFaceSource(model_dir), fresh.root / "out", FP8, CPU)
    assert_same_scales(report_of(fresh.root / "out"), report_of(checkpoint_dir))


@pytest.mark.gpu
def test_a_gpu_gives_a_cpus_scales_and_the_bytes_of_its_own(
    model_dir: Path, checkpoint_dir: Path, fresh: Workshop
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    convert(HuggingFaceSource(model_dir), fresh.root / "out", FP8, torch.device("cuda"))
    assert_same_scales(report_of(fresh.root / "out"), report_of(checkpoint_dir))
    found, expected = (
        load_file(d / "rank0.safetensors") for d in (fresh.root / "out", checkpoint_dir)
    )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if not name.endswith("activation_scaling_factor") and "kv_cache" not in name:
            assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name
