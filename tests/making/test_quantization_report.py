"""The report's numbers against float64, and its page."""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from build.conversion.calibration.calibration_set import load_calibration_set
from build.conversion.quantization.quantization_error import quantization_error
from build.conversion.report.quantization_report import (
    AttentionReport,
    LinearReport,
    QuantizationReport,
)
from build.conversion.report.report_page import Origin, page
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats.manifest import read_manifest
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import LinearScales, fp8
from tests.conftest import TINY
from tests.reference import fp8_e4m3, qwen2_hugging_face
from tests.support.command import CONVERT, one_line_error, run_command
from tests.support.tolerances import FP8_LINEAR, FP8_LINEAR_ELSEWHERE, relative_error

LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def test_errors_and_shares_are_those_of_float64() -> None:
    """Against numpy on the bit definition of e4m3; a tenth of the inputs exceeds the scale."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 96, generator=generator) ** 3
    weight = torch.randn(50, 96, generator=generator).to(torch.bfloat16)
    x_scale, weight_scale = float(x.abs().quantile(0.9)) / 448, float(weight.abs().max()) / 448
    found = quantization_error(x, weight, fp8.FP8, LinearScales(weight_scale, x_scale))

    x64, weight64 = x.double().numpy(), weight.double().numpy()
    x_codes = fp8_e4m3.quantize(x.numpy(), x_scale)
    weight_codes = fp8_e4m3.quantize(weight.float().numpy(), weight_scale)
    x_fp8 = fp8_e4m3.dequantize(x_codes, x_scale)
    weight_fp8 = fp8_e4m3.dequantize(weight_codes, weight_scale)

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    assert found.weight_error == pytest.approx(error(weight_fp8, weight64), rel=1e-5)
    expected = error(x_fp8 @ weight_fp8.T, x64 @ weight64.T)
    assert found.output_error == pytest.approx(expected, rel=1e-4)
    assert found.clipped_share == pytest.approx(float((np.abs(x64) > 448 * x_scale).mean()))
    assert found.clipped_share == pytest.approx(0.1, abs=0.01)
    assert found.underflow_share == pytest.approx(float(((x_fp8 == 0) & (x64 != 0)).mean()))
    assert found.underflow_share > 0


def inputs_of_linears(model_dir: Path, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """What enters every linear in transformers' Qwen2 (float32): rows of all prompts."""
    model = qwen2_hugging_face.load(model_dir)
    seen: dict[str, list[torch.Tensor]] = {}
    for i, block in enumerate(model.model.layers):
        for name, (first, *_) in LINEARS.items():
            module = block.get_submodule(first)
            key = f"transformer.layers.{i}.{name}"

            def see(_: Any, inputs: tuple[torch.Tensor], key: str = key) -> None:
                seen.setdefault(key, []).append(inputs[0].flatten(0, -2).detach())

            module.register_forward_pre_hook(see)
    for token_ids in prompts:
        embeds = qwen2_hugging_face.embed(model, token_ids, None, None)
        qwen2_hugging_face.all_logits(model, embeds)
    return {name: torch.cat(rows) for name, rows in seen.items()}


def test_fp8_linears_are_near_float64_on_calibration_data_and_on_other_data(
    model_dir: Path, tmp_path: Path
) -> None:
    """The stored weights and scales, run by the runtime's linear, against published weights."""
    data = tmp_path / "prompts.txt"
    data.write_text("How many shapes are there?\nName the colours, one by one.\n")
    flags = ("--calib_data", data, "--device", "cpu", "--output_dir", tmp_path / "checkpoint")
    assert run_command(CONVERT, "--model_dir", model_dir, *flags).exit_code == 0
    stored = load_file(tmp_path / "checkpoint" / "rank0.safetensors")
    published: dict[str, torch.Tensor] = {}
    for path in model_dir.glob("*.safetensors"):
        published |= load_file(path)
    source = HuggingFaceSource(model_dir)
    samples = load_calibration_set(data, 2, source.config, Tokenizer(model_dir)).samples
    seen = [sample.prompt.token_ids for sample in samples]
    generator = torch.Generator().manual_seed(5)
    unseen = [torch.randint(400, (60,), generator=generator).tolist() for _ in range(2)]
    for prompts, limit in ((seen, FP8_LINEAR), (unseen, FP8_LINEAR_ELSEWHERE)):
        for name, x in inputs_of_linears(model_dir, prompts).items():
            layer, linear = re.fullmatch(r"transformer\.layers\.(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            prefix = f"language_model.model.layers.{layer}."
            parts = [published[f"{prefix}{part}.weight"] for part in LINEARS[linear]]
            expected = x.double() @ torch.cat(parts).double().T
            quantised = QuantizableLinear(
                stored[f"{name}.weight"],
                number_format=fp8.FP8,
                scales=LinearScales(
                    weight=float(stored[f"{name}.weights_scaling_factor"]),
                    activation=float(stored[f"{name}.activation_scaling_factor"]),
                ),
            )
            error = relative_error(quantised(x), expected)
            assert 0.02 < error <= limit, f"{name}: {error}"


@pytest.fixture(scope="module")
def report(checkpoint_dir: Path) -> QuantizationReport:
    return QuantizationReport.read(checkpoint_dir / "quantization_report.json")


def test_the_report_has_every_linear_worst_first_with_the_stored_scales(
    checkpoint_dir: Path, report: QuantizationReport
) -> None:
    stored = load_file(checkpoint_dir / "rank0.safetensors")
    stored |= load_file(checkpoint_dir / "vision" / "scales.safetensors")
    names = {name.rpartition(".")[0] for name in stored if name.endswith("weights_scaling_factor")}
    assert {row.linear for row in report.linears} == names
    assert len(names) == 5 * TINY.num_hidden_layers + 4 * TINY.vision_num_hidden_layers
    errors = [row.output_error for row in report.linears]
    assert errors == sorted(errors, reverse=True)
    for row in report.linears:
        for kind in ("weights_scaling_factor", "activation_scaling_factor"):
            assert row.to_json()[kind] == float(stored[f"{row.linear}.{kind}"])
        assert row.clipped_share == 0, "a scale made from amax clips nothing of its own data"
        assert row.num_rows >= 16
        assert 0.02 < row.weight_error < 0.03
        assert 0.025 < row.output_error <= FP8_LINEAR


class Outside(HTMLParser):
    """Collects what a page would fetch from elsewhere, and counts elements."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "srcset")]


def test_the_page_stands_alone_and_shows_every_linear(
    checkpoint_dir: Path, report: QuantizationReport
) -> None:
    text = (checkpoint_dir / "quantization_report.html").read_text()
    parser = Outside()
    parser.feed(text)
    assert parser.fetched == []
    assert "url(" not in text
    assert "<script" not in text
    assert parser.count["svg"] == 5 + 2 + 5, "decoder, its attention, vision"
    assert parser.count["tr"] == 1 + len(report.linears) + 1 + TINY.num_hidden_layers
    places = [text.index(f">{row.linear}<") for row in report.worst_first]
    assert places == sorted(places)


ORIGIN = Origin("NVLM-D-72B (80 layers of 8,192)", "2026-11-30", "photos & scans")


def test_the_page_names_model_day_and_samples_and_its_axes(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("What is this?\n")
    flags = ("--calib_data", tmp_path / "prompts.txt", "--output_dir", tmp_path / "out")
    assert run_command(CONVERT, "--model_dir", model_dir, *flags).exit_code == 0
    text = (tmp_path / "out" / "quantization_report.html").read_text()
    head = text[: text.index("<svg")]
    layers, size = TINY.num_hidden_layers, TINY.hidden_size
    assert f"{model_dir.name} ({layers} layers of {size:,})" in head
    assert f"{time.strftime('%Y-%m-%d')}, calibrated on prompts.txt" in head
    for label in ("layer", "relative error (share)", "amax of the input, log scale", "amax"):
        assert f">{label}<" in text or f">{label}, log scale<" in text
    assert text.count('class="axes"') == text.count("<svg")


def test_the_page_escapes_what_it_is_given() -> None:
    text = page(QuantizationReport(1, 0, (), (), "bfloat16"), ORIGIN)
    assert "photos &amp; scans" in text
    assert "<title>Quantization report: NVLM-D-72B" in text


def test_the_day_of_the_report_is_no_part_of_the_checkpoints_digest(checkpoint_dir: Path) -> None:
    """The same conversion on another day is the same checkpoint: its engines stay up to date."""
    manifest = read_manifest(checkpoint_dir, "checkpoint")
    page_entry = manifest.files["quantization_report.html"]
    other = {**manifest.files, "quantization_report.html": replace(page_entry, sha256="0" * 64)}
    assert replace(manifest, files=other).digest == manifest.digest
    other = {**manifest.files, "config.json": replace(page_entry, sha256="0" * 64)}
    assert replace(manifest, files=other).digest != manifest.digest


def test_the_page_draws_what_is_extreme_or_missing() -> None:
    scales = LinearScales(1.0, 1e27)
    row = LinearReport("transformer.layers.0.mlp.fc", 0.0, 1e30, scales, 0, 0, 0, 0, 1)
    attention = AttentionReport("transformer.layers.0.attention", 0.0, 1e-30, 5.0)
    for linears, attentions in (((row,), (attention,)), ((), ())):
        text = page(QuantizationReport(1, 0, linears, attentions, "bfloat16"), ORIGIN)
        assert "nan" not in text
        assert text.endswith("</body></html>\n")


def test_quantising_in_chunks_gives_the_values_of_the_definition() -> None:
    x = torch.randn(700, 1000).to(torch.bfloat16)
    x[3, 5], x[699, 999] = 1e4, -1e4
    scale = 0.0123
    whole = (x.float() / torch.tensor(scale)).clamp(-448, 448).to(torch.float8_e4m3fn)
    for given, expected in ((x, whole), (x.T, whole.T)):
        found = fp8.quantize(given, scale)
        assert found.shape == given.shape
        bits = expected.contiguous().view(torch.uint8)
        assert torch.equal(found.contiguous().view(torch.uint8), bits)


def test_calibration_data_may_be_a_folder_of_images(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for name, colour in (("b.png", "red"), ("a.jpg", "blue"), ("more/c.webp", "green")):
        Image.new("RGB", (60, 60), colour).save(folder / name)
    (folder / "b.png").rename(folder / "data:b.png")  # a file's name, and no URL
    (folder / "LICENSE").write_text("free")
    flags = ("--calib_data", folder, "--device", "cpu", "--output_dir", tmp_path / "out")
    assert run_command(CONVERT, "--model_dir", model_dir, *flags).exit_code == 0
    values = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert (values["num_calibration_samples"], values["num_skipped"]) == (3, 1)
    assert "LICENSE is skipped" in caplog.text


def test_calibration_data_names_images_as_request_lines_do(
    model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, data = tmp_path / "a b.png", tmp_path / "lines.jsonl"
    Image.new("RGB", (60, 60), "red").save(path)
    inline = base64.b64encode(path.read_bytes()).decode()
    names = (path.name, path.as_uri(), f"data:image/png;base64,{inline}")
    lines = [{"prompt": "What?", "image": name} for name in (*names, "https://a.example/b.png")]
    data.write_text("\n".join(map(json.dumps, lines)))
    config, tokenizer = HuggingFaceSource(model_dir).config, Tokenizer(model_dir)
    found = load_calibration_set(data, 9, config, tokenizer)
    assert (len(found.samples), found.num_skipped) == (3, 1)
    first, *others = (sample.load_tiles() for sample in found.samples)
    assert all((tiles == first).all() for tiles in others)
    assert "line 4 is skipped: image https://a.example/b.png is an address" in caplog.text


def test_text_calibrates_the_decoder_alone(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('What is this?\n\n{"not": "JSON here"}\n')
    flags = ("--calib_data", tmp_path / "prompts.txt", "--output_dir", tmp_path / "out")
    assert run_command(CONVERT, "--model_dir", model_dir, *flags).exit_code == 0
    report = QuantizationReport.read(tmp_path / "out" / "quantization_report.json")
    assert report.num_samples == 2
    assert all(row.linear.startswith("transformer.") for row in report.linears)
    assert not (tmp_path / "out" / "vision" / "scales.safetensors").exists()


@pytest.mark.parametrize("text", ["# no JSON", "{}"])
def test_a_cache_that_is_no_report_is_refused_with_what_to_give(
    tmp_path: Path, model_dir: Path, text: str
) -> None:
    (tmp_path / "cache").write_text(text)
    flags = ("--model_dir", model_dir, "--output_dir", tmp_path / "new")
    result = run_command(CONVERT, *flags, "--calib_cache", tmp_path / "cache")
    one_line_error(result, str(tmp_path / "cache"), "quantization_report.json", "--calib_cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
