"""--exclude_modules: named linears keep the published values, everywhere that can hold them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from build.conversion.report.quantization_report import QuantizationReport
from build.exports.checkpoint_source import CheckpointSource
from build.exports.export import export
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import SCHEMES
from nvlm.formats.checkpoint_config import CheckpointConfig
from tests.conftest import BF16, CPU, FP8, Workshop
from tests.support.command import BUILD, CONVERT, one_line_error, refused, run_command
from tests.support.decoding import engine_logits
from tests.support.tolerances import FAST_PATH_LOGITS, KERNEL_LOGITS, relative_error
from tools.sensitivity.parts import Part, parts
from tools.sensitivity.whole_model import SequenceAttention, WholeModel

NAMES = ("transformer.layers.1.mlp.proj", "*.attention.qkv")
EXCLUDED = ((0, "attention.qkv"), (1, "attention.qkv"), (1, "mlp.proj"))
OPTIONS = replace(FP8, exclude_modules=NAMES)
PUBLISHED = (
    *(f"layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qkv"),
    "layers.1.mlp.down_proj",
)
PROMPT, TOKENS = list(range(10, 40)), list(range(100, 116))


@pytest.fixture(scope="module")
def excluding(workshop: Workshop, model_dir: Path) -> Path:
    return workshop.checkpoint("excluding", model_dir, OPTIONS)


def test_excluded_linears_are_the_published_ones_without_scales(
    workshop: Workshop, model_dir: Path, excluding: Path, checkpoint_dir: Path
) -> None:
    found, whole = (load_file(path / "rank0.safetensors") for path in (excluding, checkpoint_dir))
    plain = load_file(workshop.checkpoint("bf16_checkpoint", model_dir, BF16) / "rank0.safetensors")
    for name, tensor in found.items():
        linear = name.removesuffix(".weight")
        is_excluded = linear in {f"transformer.layers.{i}.{part}" for i, part in EXCLUDED}
        expected = plain[name] if is_excluded else whole[name]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor.float(), expected.float()), name
    left_out = whole.keys() - found.keys()
    assert len(left_out) == 2 * len(EXCLUDED)
    assert all(name.endswith("scaling_factor") for name in left_out)
    config = json.loads((excluding / "config.json").read_text())
    assert config["quantization"]["exclude_modules"] == list(NAMES)


def test_ranks_hold_parts_of_the_same_tensors(
    fresh: Workshop, model_dir: Path, excluding: Path
) -> None:
    """Layer 1 is layer 0 of the second stage."""
    ranks = fresh.checkpoint("ranks", model_dir, replace(OPTIONS, tp_size=2, pp_size=2))
    chosen = HuggingFaceFormat(SCHEMES["modelopt"], None)
    export(CheckpointSource(ranks), fresh.root / "of_ranks", chosen)
    export(CheckpointSource(excluding), fresh.root / "of_one", chosen)
    files = [fresh.root / name / "model.safetensors" for name in ("of_ranks", "of_one")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_export_lists_what_it_leaves_out(scheme: str, excluding: Path, tmp_path: Path) -> None:
    for is_text_only, prefix in ((False, "language_model.model."), (True, "model.")):
        place = tmp_path / str(is_text_only)
        chosen = HuggingFaceFormat(SCHEMES[scheme], None, is_text_only)
        export(CheckpointSource(excluding), place, chosen)
        ignored = json.loads((place / "config.json").read_text())["quantization_config"]["ignore"]
        names = {f"{prefix}{name}" for name in PUBLISHED}
        assert names <= set(ignored)
        stored = load_file(place / "model.safetensors")
        for name, tensor in stored.items():
            linear = name.removesuffix(".weight")
            if linear != name and f"{linear}.weight_scale" not in stored:
                assert tensor.dtype == torch.bfloat16
        assert not names & {name.removesuffix(".weight_scale") for name in stored}


def test_the_engine_computes_what_stays_in_dtype_and_the_rest_in_fp8(
    workshop: Workshop, model_dir: Path, excluding: Path
) -> None:
    """Against tools.sensitivity, which puts parts of the unquantised model in FP8."""
    engine = workshop.engine("excluding_engine", excluding, vision="torch")
    found = engine_logits(engine, PROMPT, TOKENS)
    plain = workshop.checkpoint("bf16_checkpoint", model_dir, BF16)
    report = QuantizationReport.read(excluding / "quantization_report.json")
    config = CheckpointConfig.read(plain / "config.json")
    with torch.inference_mode():
        model = WholeModel(plain, config, report, CPU)
        whole = parts(2, "linear", has_vision_scales=False)[-1]
        for pieces, is_same in ((whole.pieces - set(EXCLUDED), True), (whole.pieces, False)):
            with model.quantised(Part("left", pieces)) as caches:
                hidden = model.embed(PROMPT + TOKENS[:-1], None)
                states = model.run(hidden, SequenceAttention(caches))
                expected = model.logits(states[-len(TOKENS) :])
            error = relative_error(found, expected)
            assert (error < KERNEL_LOGITS) == is_same, error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_a_gpu_computes_what_the_cpu_does(workshop: Workshop, excluding: Path) -> None:
    """With the plain form, as no kernel takes a linear in dtype: sums alone differ in order."""
    engine = workshop.engine("excluding_engine", excluding, vision="torch")
    expected, found = (engine_logits(engine, PROMPT, TOKENS, on) for on in ("cpu", "cuda"))
    error = relative_error(found.cpu(), expected)
    assert error < FAST_PATH_LOGITS, error


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("lm_head",), ("lm_head is no linear", "transformer.layers.0.attention.qkv")),
        (("*",), ("names every linear", "--quant_algo none")),
        (
            ("*.mlp.proj", "--quant_algo", "none"),
            ("--exclude_modules needs --quant_algo FP8",),
        ),
        (
            ("transformer.layers.0.mlp.fc", "--output_format", "modelopt"),
            ("transformer.layers.0.mlp.fc and transformer.layers.0.mlp.gate", "both or neither"),
        ),
    ],
)
def test_names_that_cannot_be_excluded_are_refused(
    flags: tuple[str, ...], fragments: tuple[str, ...], model_dir: Path, tmp_path: Path
) -> None:
    start = ("--model_dir", model_dir, "--output_dir", tmp_path / "new", "--device", "cpu")
    refused(tmp_path, CONVERT, *start, "--exclude_modules", *flags, fragments=fragments)


def test_tensorrt_llm_is_refused_and_auto_takes_torch(excluding: Path, tmp_path: Path) -> None:
    start = ("--checkpoint_dir", excluding, "--engine_dir", tmp_path / "new", "--vision", "torch")
    fragments = ("--decoder tensorrt_llm", "--exclude_modules", "--decoder torch")
    refused(tmp_path, BUILD, *start, "--decoder", "tensorrt_llm", fragments=fragments)
    assert run_command(BUILD, *start).exit_code == 0
    config = json.loads((tmp_path / "new" / "llm" / "config.json").read_text())
    assert config["pretrained_config"]["quantization"]["exclude_modules"] == list(NAMES)


def test_a_damaged_list_is_reported(fresh: Workshop, model_dir: Path) -> None:
    checkpoint = fresh.checkpoint("checkpoint", model_dir, OPTIONS)
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    values["quantization"]["exclude_modules"] = "mlp"
    path.write_text(json.dumps(values))
    engine = ("--engine_dir", fresh.root / "engine", "--vision", "torch")
    result = run_command(BUILD, "--checkpoint_dir", checkpoint, *engine)
    one_line_error(result, str(path))
