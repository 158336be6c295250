"""What a part in FP8 does to its layer's output, against transformers' layer in float64."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.qwen2.modeling_qwen2 as modeling_qwen2
from safetensors.torch import load_file, save_file
from torch import nn

from build.conversion.calibration import probe_decoder
from build.conversion.calibration.calibration_set import load_calibration_set
from build.conversion.convert import ConvertOptions
from build.conversion.report.quantization_report import QuantizationReport
from build.sources.hugging_face import HuggingFaceSource
from nvlm.inputs.tokenizer import Tokenizer
from tests.conftest import TINY, Workshop
from tests.reference import fp8_e4m3, qwen2_hugging_face
from tests.support.command import CONVERT, run_command
from tests.support.tolerances import AMAX, RESIDUAL_ERROR

LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
PROMPTS = "How many shapes are there?\nName the colours of all of them, one by one, please.\n"


@pytest.fixture(scope="module")
def converted(workshop: Workshop, model_dir: Path) -> tuple[QuantizationReport, list[list[int]]]:
    """The report of a float32 conversion, and the token ids it calibrated with."""
    data = workshop.root / "residual_prompts.txt"
    data.write_text(PROMPTS)
    options = ConvertOptions(dtype="float32", calib_data=data, calib_size=2)
    checkpoint = workshop.checkpoint("residual_checkpoint", model_dir, options)
    source = HuggingFaceSource(model_dir)
    samples = load_calibration_set(data, 2, source.config, Tokenizer(model_dir)).samples
    report = QuantizationReport.read(checkpoint / "quantization_report.json")
    ids = [sample.prompt.token_ids[: probe_decoder.NUM_TOKENS] for sample in samples]
    return report, ids


def fake(x: torch.Tensor, scale: float) -> torch.Tensor:
    codes = fp8_e4m3.quantize(x.detach().numpy(), scale)
    return torch.from_numpy(fp8_e4m3.dequantize(codes, scale)).to(x.dtype)


@contextmanager
def quantised(block: nn.Module, names: tuple[str, ...], row: Any) -> Iterator[None]:
    """The block with these linears' weights and inputs rounded to FP8."""
    handles, kept = [], {}
    for name in names:
        linear = block.get_submodule(name)
        kept[name] = linear.weight.data
        linear.weight.data = fake(linear.weight.data, row.scales.weight)

        def see(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            return (fake(inputs[0], row.scales.activation),)

        handles.append(linear.register_forward_pre_hook(see))
    yield
    for handle in handles:
        handle.remove()
    for name, weight in kept.items():
        block.get_submodule(name).weight.data = weight


@contextmanager
def stored(block: Any, monkeypatch: pytest.MonkeyPatch, key: float, value: float) -> Iterator[None]:
    """The block's attention with K and V rounded to FP8, after bias and RoPE; others' without."""
    eager = modeling_qwen2.eager_attention_forward

    def forward(module: Any, q: Any, k: Any, v: Any, *rest: Any, **keywords: Any) -> Any:
        if module is block.self_attn:
            k, v = fake(k, key), fake(v, value)
        return eager(module, q, k, v, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen2, "eager_attention_forward", forward)
        yield


def outputs(model: Any, ids: list[list[int]], layer: int) -> torch.Tensor:
    """The hidden states after a layer, of all prompts: [tokens, hidden_size]."""
    rows = []
    seen: list[torch.Tensor] = []

    def see(_: Any, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[layer].register_forward_hook(see)
    for token_ids in ids:
        qwen2_hugging_face.all_logits(model, qwen2_hugging_face.embed(model, token_ids))
        rows.append(seen.pop().reshape(-1, model.config.hidden_size))
    handle.remove()
    return torch.cat(rows).double()


def test_each_linears_error_is_that_of_transformers_layer(
    converted: tuple[QuantizationReport, list[list[int]]], model_dir: Path
) -> None:
    report, ids = converted
    model = qwen2_hugging_face.load(model_dir)
    for i in range(TINY.num_hidden_layers):
        whole = outputs(model, ids, i)
        for row in report.linears_of(f"transformer.layers.{i}."):
            names = LINEARS[row.linear.removeprefix(f"transformer.layers.{i}.")]
            with quantised(model.model.layers[i], names, row):
                found = outputs(model, ids, i)
            expected = float((found - whole).norm() / whole.norm())
            assert row.residual_error == pytest.approx(expected, rel=RESIDUAL_ERROR), row.linear
            assert expected > 1e-4


def test_the_caches_errors_are_those_of_transformers_attention(
    converted: tuple[QuantizationReport, list[list[int]]],
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, ids = converted
    model = qwen2_hugging_face.load(model_dir)
    for i, row in enumerate(report.attentions):
        whole = outputs(model, ids, i)
        one = row.kv_cache_scaling_factor
        own = [float(np.float32(amax) / np.float32(448)) for amax in (row.k_amax, row.v_amax)]
        for key, value, found in (
            (one, one, row.residual_error),
            (*own, row.own_scales_residual_error),
        ):
            with stored(model.model.layers[i], monkeypatch, key, value):
                error = float((outputs(model, ids, i) - whole).norm() / whole.norm())
            assert found == pytest.approx(error, rel=RESIDUAL_ERROR)


def test_heads_have_their_amax_and_the_largest_is_the_layers(
    converted: tuple[QuantizationReport, list[list[int]]],
) -> None:
    report, _ = converted
    for row in report.attentions:
        assert len(row.q_head_amax) == TINY.num_attention_heads
        assert len(row.k_head_amax) == len(row.v_head_amax) == TINY.num_key_value_heads
        largest = max(row.q_head_amax), max(row.k_head_amax), max(row.v_head_amax)
        assert largest == (row.q_amax, row.k_amax, row.v_amax)


def test_a_k_bias_that_takes_vs_resolution_is_warned_of(
    fresh: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    """As Qwen2's: a few channels of K in the hundreds beside a small V."""
    model = fresh.model("model")
    layer = "language_model.model.layers.1.self_attn."
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name == f"{layer}k_proj.bias":
                tensors[name][3] = 900.0
            elif name.startswith(f"{layer}v_proj."):
                tensors[name] *= 0.01
        save_file(tensors, path, {"format": "pt"})
    data = fresh.root / "prompts.txt"
    data.write_text(PROMPTS)
    options = ConvertOptions(calib_data=data, calib_size=2)
    with caplog.at_level(logging.WARNING):
        checkpoint = fresh.checkpoint("checkpoint", model, options)
    assert "transformer.layers.1.attention: " in caplog.text
    assert "take resolution from V's" in caplog.text
    report = QuantizationReport.read(checkpoint / "quantization_report.json")
    first, second = report.attentions
    assert not first.takes_resolution
    assert second.takes_resolution
    assert second.v_error is not None
    assert second.v_own_scale_error is not None
    assert second.v_error > 0.05 > second.v_own_scale_error
    assert max(second.k_head_amax) / min(second.k_head_amax) > 50
    assert "take resolution from V" in (checkpoint / "quantization_report.html").read_text()


def test_a_quantised_linear_is_not_seen_by_the_calibration(
    converted: tuple[QuantizationReport, list[list[int]]], model_dir: Path
) -> None:
    """What the probe sends through a layer changes neither amax nor scales."""
    report, _ = converted
    model = qwen2_hugging_face.load(model_dir)
    seen: list[float] = []
    handle = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: seen.append(float(inputs[0].abs().max()))
    )
    source = HuggingFaceSource(model_dir)
    data = model_dir.parent / "residual_prompts.txt"
    for sample in load_calibration_set(data, 2, source.config, Tokenizer(model_dir)).samples:
        embeds = qwen2_hugging_face.embed(model, sample.prompt.token_ids)
        qwen2_hugging_face.all_logits(model, embeds)
    handle.remove()
    (row,) = (row for row in report.linears if row.linear == "transformer.layers.0.mlp.proj")
    assert row.input_amax == pytest.approx(max(seen), rel=AMAX)


def test_reports_of_older_versions_are_still_read_and_shown(
    checkpoint_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    values = json.loads((checkpoint_dir / "quantization_report.json").read_text())
    for row in values["linears"]:
        del row["residual_error"]
    kept = {"layer", "q_amax", "k_amax", "v_amax", "kv_cache_scaling_factor"}
    values["attention"] = [
        {key: value for key, value in row.items() if key in kept} for row in values["attention"]
    ]
    (tmp_path / "old.json").write_text(json.dumps(values))
    flags = ("--model_dir", model_dir, "--output_dir", tmp_path / "out", "--device", "cpu")
    result = run_command(CONVERT, *flags, "--calib_cache", tmp_path / "old.json")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "out" / "quantization_report.html").read_text()
    assert text.count("<svg") == 4 + 1 + 4
    found = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert all(row["residual_error"] is None for row in found["linears"])
