"""--quantize_lm_head: the decoder's head in FP8, everywhere that can hold it, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from build.conversion import decoder_step
from build.conversion.calibration.calibration_set import load_calibration_set
from build.conversion.convert import convert
from build.conversion.report.quantization_report import QuantizationReport
from build.exports.checkpoint_source import CheckpointSource
from build.exports.export import export
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import SCHEMES
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.inputs.tokenizer import Tokenizer
from runtime.decoder.models.plain_model import PlainModel
from runtime.decoder.models.step import SequenceStep
from runtime.decoder.models.torch_weights import load_weights, open_weights
from runtime.engine.engine_dir import EngineDir
from tests.conftest import BF16, CPU, FP8, TINY, Workshop
from tests.reference import fp8_e4m3
from tests.support.command import BUILD, CONVERT, refused, run_command, tree
from tests.support.tolerances import AMAX_AFTER_BF16, FP8_DEFINITION, FP8_LINEAR, relative_error
from tests.support.waiting import eventually

OPTIONS = replace(FP8, quantize_lm_head=True)
WEIGHT_SCALE, INPUT_SCALE = "lm_head.weights_scaling_factor", "lm_head.activation_scaling_factor"
REPORT = "quantization_report.json"
NUM_UNITS_BEFORE = 1 + 2 + 1 + 1 + 2
"""The tiny model has ViT embeddings, 2 layers, projector; decoder embedding, 2 layers."""
# TensorRT-LLM 1.2.1's default without `*lm_head` (quantize_layers of quantization/quantize.py).
EXCLUDED = [
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
]


@pytest.fixture(scope="module")
def quantised(workshop: Workshop, model_dir: Path) -> Path:
    return workshop.checkpoint("head_checkpoint", model_dir, OPTIONS)


def published_head(model_dir: Path) -> torch.Tensor:
    tensors: dict[str, torch.Tensor] = {}
    for path in model_dir.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors["language_model.lm_head.weight"].to(torch.bfloat16)


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def codes(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(torch.uint8).numpy()


def test_the_head_is_the_nearest_e4m3_and_no_other_tensor_changes(
    quantised: Path, checkpoint_dir: Path, model_dir: Path
) -> None:
    found, plain = (load_file(path / "rank0.safetensors") for path in (quantised, checkpoint_dir))
    assert found.keys() - plain.keys() == {WEIGHT_SCALE, INPUT_SCALE}
    for name in plain.keys() - {"lm_head.weight"}:
        assert torch.equal(found[name].view(torch.uint8), plain[name].view(torch.uint8)), name
    weight = published_head(model_dir).float().numpy()
    scale = float(found[WEIGHT_SCALE])
    assert scale == fp8_e4m3.linear_scale(float(np.abs(weight).max()), "bfloat16")
    assert np.array_equal(codes(found["lm_head.weight"]), fp8_e4m3.quantize(weight, scale))
    assert found[WEIGHT_SCALE].shape == found[INPUT_SCALE].shape == (1,)


def test_without_the_flag_nothing_speaks_of_it(checkpoint_dir: Path) -> None:
    """Directories of older versions stay current, and this one's are theirs."""
    assert "exclude_modules" not in config_of(checkpoint_dir)["quantization"]
    manifest = json.loads((checkpoint_dir / "manifest.json").read_text())
    assert "quantize_lm_head" not in manifest["arguments"]
    assert not QuantizationReport.read(checkpoint_dir / REPORT).linears_of("lm_head")


def test_config_json_is_tensorrt_llms_for_a_head_that_is_an_fp8_linear(quantised: Path) -> None:
    assert config_of(quantised)["quantization"] == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": EXCLUDED,
    }
    config = CheckpointConfig.read(quantised / "config.json")
    assert config.quantize_lm_head
    assert config.exclude_modules == ()


def test_linears_may_stay_in_dtype_beside_it(fresh: Workshop, model_dir: Path) -> None:
    options = replace(OPTIONS, exclude_modules=("*.mlp.proj", "*.1.attention.qkv"))
    checkpoint = fresh.checkpoint("checkpoint", model_dir, options)
    patterns = config_of(checkpoint)["quantization"]["exclude_modules"]
    assert patterns == ["*.mlp.proj", "*.1.attention.qkv", *EXCLUDED]
    config = CheckpointConfig.read(checkpoint / "config.json")
    assert config.exclude_modules == options.exclude_modules
    assert config.quantize_lm_head
    stored = load_file(checkpoint / "rank0.safetensors")
    assert stored["transformer.layers.0.mlp.proj.weight"].dtype == torch.bfloat16
    assert stored["lm_head.weight"].dtype == torch.float8_e4m3fn


class Normed:
    """In the place of a head: what enters it comes out."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x


def plain_model(engine_dir: Path, *, without_head: bool = False) -> PlainModel:
    config = EngineDir.read(engine_dir).checkpoint_config
    weights = load_weights(open_weights(engine_dir / "llm", config), config, CPU)
    if without_head:
        weights = replace(weights, lm_head=Normed())  # type: ignore[arg-type]
    return PlainModel(config, weights, 64, CPU)


def every_row(token_ids: list[int]) -> list[SequenceStep]:
    blocks = list(range(-(-len(token_ids) // 16)))
    return [SequenceStep(token_ids, 0, blocks, None, len(token_ids))]


@torch.inference_mode()
def test_its_input_scale_covers_the_normed_rows_of_every_sample(
    fresh: Workshop, model_dir: Path
) -> None:
    """Against the runtime's own run of the unquantised model over the same tokens."""
    path = fresh.root / "prompts.txt"
    path.write_text("What is this?\nWhere do trains go at night, and why do they?\n")
    options = replace(OPTIONS, calib_data=path)
    checkpoint = fresh.checkpoint("checkpoint", model_dir, options)
    report = QuantizationReport.read(checkpoint / REPORT)
    (row,) = report.linears_of("lm_head")
    plain = fresh.engine("plain", fresh.checkpoint("bf16", model_dir, BF16), vision="torch")
    model = plain_model(plain, without_head=True)
    source = HuggingFaceSource(model_dir)
    calibration = load_calibration_set(path, 2, source.config, Tokenizer(source.tokenizer_dir))
    rows = [model.forward(every_row(list(s.prompt.token_ids))) for s in calibration.samples]
    amax = max(float(each.abs().max()) for each in rows)
    assert row.input_amax == pytest.approx(amax, rel=AMAX_AFTER_BF16)
    stored = float(load_file(checkpoint / "rank0.safetensors")[INPUT_SCALE])
    assert stored == fp8_e4m3.linear_scale(row.input_amax, "bfloat16")


def test_the_report_has_its_row_with_errors_of_fp8(quantised: Path, model_dir: Path) -> None:
    (row,) = QuantizationReport.read(quantised / REPORT).linears_of("lm_head")
    weight = published_head(model_dir).double().numpy()
    stored = fp8_e4m3.quantize(weight, row.scales.weight)
    rounded = fp8_e4m3.dequantize(stored, row.scales.weight)
    error = np.linalg.norm(rounded - weight) / np.linalg.norm(weight)
    assert row.weight_error == pytest.approx(error, rel=1e-4)
    assert 0.02 < row.output_error <= FP8_LINEAR
    assert row.clipped_share == 0
    assert row.num_rows >= 16
    assert row.residual_error is None, "nothing of the residual stream follows it"
    assert ">lm_head<" in (quantised / "quantization_report.html").read_text()


@torch.inference_mode()
def test_the_engine_multiplies_the_codes_that_the_definition_gives(
    workshop: Workshop, quantised: Path, engine_dir: Path
) -> None:
    """float64 by numpy. What enters the head is that of the engine with an unquantised one."""
    engine = workshop.engine("head_engine", quantised, vision="torch", max_num_images=3)
    steps = every_row([7 * i % 500 for i in range(40)])
    found = plain_model(engine).forward(steps)
    assert found.dtype == torch.float32
    normed = plain_model(engine_dir, without_head=True).forward(steps)
    stored = load_file(quantised / "rank0.safetensors")
    scale = float(stored[INPUT_SCALE])
    x = fp8_e4m3.dequantize(fp8_e4m3.quantize(normed.float().numpy(), scale), scale)
    weight = fp8_e4m3.dequantize(codes(stored["lm_head.weight"]), float(stored[WEIGHT_SCALE]))
    assert relative_error(found, torch.from_numpy(x @ weight.T)) < FP8_DEFINITION
    unquantised = plain_model(engine_dir).forward(steps)
    assert 0.01 < relative_error(found, unquantised) < FP8_LINEAR


def test_ranks_share_its_scales_and_join_to_it(fresh: Workshop) -> None:
    """Three rows of the last rank are padding: codes of zero."""
    model = fresh.model("model", replace(TINY, vocab_size=513))
    whole = load_file(fresh.checkpoint("one", model, OPTIONS) / "rank0.safetensors")
    ranks = fresh.checkpoint("four", model, replace(OPTIONS, tp_size=4))
    parts = [load_file(ranks / f"rank{rank}.safetensors") for rank in range(4)]
    for name in (WEIGHT_SCALE, INPUT_SCALE):
        assert all(torch.equal(part[name], whole[name]) for part in parts)
    joined = np.concatenate([codes(part["lm_head.weight"]) for part in parts])
    assert len(joined) == 516
    assert np.array_equal(joined[:513], codes(whole["lm_head.weight"]))
    assert not joined[513:].any()


def test_a_cached_calibration_gives_the_same_bytes(
    fresh: Workshop, model_dir: Path, quantised: Path
) -> None:
    cached = replace(OPTIONS, calib_cache=quantised / REPORT)
    again = fresh.checkpoint("again", model_dir, cached)
    for name in ("rank0.safetensors", REPORT):
        assert (again / name).read_bytes() == (quantised / name).read_bytes()
    # The head's row is left out where the head is not quantised.
    without = fresh.checkpoint("without", model_dir, replace(cached, quantize_lm_head=False))
    assert not QuantizationReport.read(without / REPORT).linears_of("lm_head")


def test_a_cache_of_another_head_is_refused(
    fresh: Workshop, model_dir: Path, quantised: Path
) -> None:
    """Amax and scale changed together: only the weight shows it."""
    report = json.loads((quantised / REPORT).read_text())
    row = next(row for row in report["linears"] if row["linear"] == "lm_head")
    row["weight_amax"] *= 2
    row["weights_scaling_factor"] *= 2
    path = fresh.root / "cache.json"
    path.write_text(json.dumps(report))
    flags = ("--model_dir", model_dir, "--output_dir", fresh.root / "new", "--quantize_lm_head")
    result = run_command(CONVERT, *flags, "--calib_cache", path, "--device", "cpu")
    assert result.exit_code == 2
    assert "--calib_cache is of other weights" in result.error
    assert "lm_head" in result.error


def test_a_run_that_ended_at_the_head_resumes_there(
    fresh: Workshop, model_dir: Path, quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place = HuggingFaceSource(model_dir), fresh.root / "new"
    journal = fresh.root / "new.partial" / ".journal"

    def fail_at_head(*_: object) -> None:
        assert eventually(lambda: journal.read_bytes().count(b"\n") == 1 + NUM_UNITS_BEFORE)
        raise InterruptedError("at the head")

    def no_layer(*_: object) -> None:
        raise AssertionError("every layer was done")

    with monkeypatch.context() as patch:
        patch.setattr(decoder_step, "norm_rows", fail_at_head)
        with pytest.raises(InterruptedError):
            convert(source, place, OPTIONS, CPU)
    assert not place.exists()
    monkeypatch.setattr(decoder_step, "run_layer", no_layer)
    convert(source, place, OPTIONS, CPU)
    assert tree(place) == tree(quantised)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("is_text_only", [False, True], ids=["whole", "text"])
def test_an_export_holds_it_under_the_names_of_its_readers(
    scheme: str, is_text_only: bool, model_dir: Path, quantised: Path, tmp_path: Path
) -> None:
    """The same from the model and from a checkpoint."""
    chosen = HuggingFaceFormat(SCHEMES[scheme], model_dir, is_text_only)
    convert(HuggingFaceSource(model_dir), tmp_path / "direct", OPTIONS, CPU, output_format=chosen)
    export(CheckpointSource(quantised), tmp_path / "exported", chosen)
    weights = [tmp_path / name / "model.safetensors" for name in ("direct", "exported")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    stored, wanted = load_file(weights[0]), load_file(quantised / "rank0.safetensors")
    head = "lm_head" if is_text_only else "language_model.lm_head"
    assert np.array_equal(codes(stored[f"{head}.weight"]), codes(wanted["lm_head.weight"]))
    assert stored[f"{head}.weight"].dtype == torch.float8_e4m3fn
    shape = SCHEMES[scheme].scale_shape
    for name, ours in (("weight_scale", WEIGHT_SCALE), ("input_scale", INPUT_SCALE)):
        assert float(stored[f"{head}.{name}"]) == float(wanted[ours])
        assert tuple(stored[f"{head}.{name}"].shape) == shape
    assert not any(
        "lm_head" in name
        for name in config_of(tmp_path / "direct")["quantization_config"]["ignore"]
    )


def test_a_head_that_ranks_pad_is_exported_whole(fresh: Workshop) -> None:
    model = fresh.model("model", replace(TINY, vocab_size=511))
    chosen = HuggingFaceFormat(SCHEMES["modelopt"], None)
    for tp_size in (1, 4):
        ranks = replace(OPTIONS, tp_size=tp_size)
        checkpoint = fresh.checkpoint(f"checkpoint_{tp_size}", model, ranks)
        export(CheckpointSource(checkpoint), fresh.root / f"out_{tp_size}", chosen)
    files = [fresh.root / f"out_{tp_size}" / "model.safetensors" for tp_size in (1, 4)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_engine_directory_keeps_the_choice(quantised: Path, tmp_path: Path) -> None:
    place = tmp_path / "engine"
    flags = ("--checkpoint_dir", quantised, "--engine_dir", place, "--vision", "torch")
    assert run_command(BUILD, *flags).exit_code == 0
    config = EngineDir.read(place).checkpoint_config
    assert config.quantize_lm_head
    assert (
        config_of(place / "llm")["pretrained_config"]["quantization"]["exclude_modules"] == EXCLUDED
    )


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--quant_algo", "none"), ("--quantize_lm_head needs --quant_algo FP8", "leave it out")),
        (
            ("--quant_algo", "none", "--kv_cache_quant_algo", "FP8"),
            ("--quantize_lm_head needs --quant_algo FP8",),
        ),
        (("--exclude_modules", "lm_head"), ("lm_head names lm_head", "leave one of them out")),
        (("--exclude_modules", "*.mlp.proj", "*_head"), ("--exclude_modules *_head names",)),
    ],
)
def test_what_contradicts_it_is_refused(
    flags: tuple[str, ...], fragments: tuple[str, ...], model_dir: Path, tmp_path: Path
) -> None:
    start = ("--model_dir", model_dir, "--output_dir", tmp_path / "new", "--device", "cpu")
    refused(tmp_path, CONVERT, *start, "--quantize_lm_head", *flags, fragments=fragments)
    refused(
        tmp_path, CONVERT, *start, "--dry_run", "--quantize_lm_head", *flags, fragments=fragments
    )


def test_a_report_without_its_row_is_refused_before_anything_is_read(
    checkpoint_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    cache = ("--calib_cache", checkpoint_dir / REPORT, "--quantize_lm_head")
    start = ("--model_dir", model_dir, "--output_dir", tmp_path / "new", "--device", "cpu")
    fragments = ("no row lm_head", "--quantize_lm_head", "calibrate again")
    refused(tmp_path, CONVERT, *start, *cache, fragments=fragments)
