"""Exports for other engines, read back by the safetensors library and held against the published
weights: names, shapes, types, codes, scales, configuration; the same from every input."""

from __future__ import annotations

import json
import logging
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from build.conversion.convert import convert
from build.conversion.output_files import OutputFiles
from build.exports.checkpoint_source import CheckpointSource
from build.exports.export import export
from build.exports.hugging_face_folder import HuggingFaceFormat
from build.exports.schemes import COMPRESSED_TENSORS, MODELOPT, SCHEMES, Scheme
from build.sources.detect import open_source
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats.manifest import verify_all
from nvlm.formats.tensor_names import model_tensors
from nvlm.model.number_formats import FP8 as E4M3
from tests.conftest import CPU, FP8, TINY, Workshop
from tests.reference import fp8_e4m3
from tests.reference.megatron_writer import Layout, write_megatron
from tests.support.command import tree
from tools.model_dir import model_config

DECODER = "language_model."
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
ENGINE_LINEARS = {
    "self_attn.q_proj": "attention.qkv",
    "self_attn.k_proj": "attention.qkv",
    "self_attn.v_proj": "attention.qkv",
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
}
CACHE_SCALES = {
    "modelopt": ("self_attn.q_scale", "self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    "compressed-tensors": ("self_attn.q_scale", "self_attn.k_scale", "self_attn.v_scale"),
}
SHAPE = {"modelopt": (), "compressed-tensors": (1,)}
"""ModelOpt 0.47 and llm-compressor 0.14 write their scales so."""


def exported(workshop: Workshop, name: str, model_dir: Path, chosen: HuggingFaceFormat) -> Path:
    path = workshop.root / name
    if not path.exists():
        convert(open_source(model_dir), path, FP8, CPU, output_format=chosen)
    return path


def from_checkpoint(place: Path, checkpoint_dir: Path, chosen: HuggingFaceFormat) -> Path:
    export(CheckpointSource(checkpoint_dir), place, chosen)
    return place


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, by the safetensors library alone."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


@pytest.fixture(scope="module")
def published(model_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(model_dir).items()}


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Scheme:
    found: Scheme = request.param
    return found


def expected_scales(checkpoint_dir: Path) -> dict[str, float]:
    """By the export's names without their ends: what TensorRT-LLM's checkpoint of the same
    conversion holds."""
    stored = load_file(checkpoint_dir / "rank0.safetensors")
    scales = {}
    for i in range(TINY.num_hidden_layers):
        for name, fused in ENGINE_LINEARS.items():
            linear, engine = f"model.layers.{i}.{name}", f"transformer.layers.{i}.{fused}"
            scales[f"{linear}.weight_scale"] = float(stored[f"{engine}.weights_scaling_factor"])
            scales[f"{linear}.input_scale"] = float(stored[f"{engine}.activation_scaling_factor"])
    return scales


def same_codes(found: torch.Tensor, weight: torch.Tensor, scale: float) -> bool:
    """Whether `found` holds the codes that the definition gives."""
    codes = fp8_e4m3.quantize(weight.float().numpy(), scale)
    return bool(np.array_equal(found.view(torch.uint8).numpy(), codes))


@pytest.mark.parametrize("is_text_only", [False, True], ids=["whole", "text"])
def test_every_tensor_is_the_published_one_under_the_names_of_its_readers(
    is_text_only: bool,
    scheme: Scheme,
    workshop: Workshop,
    model_dir: Path,
    checkpoint_dir: Path,
    published: dict[str, torch.Tensor],
) -> None:
    chosen = HuggingFaceFormat(scheme, model_dir, is_text_only)
    name = f"export_{scheme.name}_{is_text_only}"
    found = tensors_of(exported(workshop, name, model_dir, chosen))
    prefix = "" if is_text_only else DECODER
    scales = {prefix + name: value for name, value in expected_scales(checkpoint_dir).items()}
    caches = {
        f"{prefix}model.layers.{i}.{cache}"
        for i in range(TINY.num_hidden_layers)
        for cache in CACHE_SCALES[scheme.name]
    }
    weights = {
        name.removeprefix(DECODER) if is_text_only else name: tensor
        for name, tensor in published.items()
        if name.startswith(DECODER) or not is_text_only
    }
    assert found.keys() == weights.keys() | scales.keys() | caches
    for name, weight in weights.items():
        scale = scales.get(name.removesuffix("weight") + "weight_scale")
        if scale is None:
            assert torch.equal(found[name], weight), name
            assert found[name].dtype == torch.bfloat16
        else:
            assert found[name].dtype == torch.float8_e4m3fn
            assert same_codes(found[name], weight, scale), name
    for name, value in scales.items():
        assert float(found[name]) == value, name
    for name in scales.keys() | caches:
        assert found[name].dtype == torch.float32
        assert tuple(found[name].shape) == SHAPE[scheme.name], name


def test_q_k_and_v_have_scales_of_their_own(
    scheme: Scheme, workshop: Workshop, model_dir: Path, checkpoint_dir: Path
) -> None:
    """TensorRT-LLM's cache has one; readers of an export take three."""
    chosen = HuggingFaceFormat(scheme, model_dir)
    found = tensors_of(exported(workshop, f"export_{scheme.name}_False", model_dir, chosen))
    report = json.loads((checkpoint_dir / "quantization_report.json").read_text())
    for i, row in enumerate(report["attention"]):
        for kind, name in zip("qkv", CACHE_SCALES[scheme.name], strict=True):
            scale = float(found[f"{DECODER}model.layers.{i}.{name}"])
            assert scale == np.float32(row[f"{kind}_amax"]) / np.float32(448)


def test_vision_in_fp8_has_codes_and_scales_and_its_dummy_heads(
    workshop: Workshop, model_dir: Path, checkpoint_dir: Path, published: dict[str, torch.Tensor]
) -> None:
    chosen = HuggingFaceFormat(COMPRESSED_TENSORS, model_dir, vision_format=E4M3)
    folder = exported(workshop, "export_fp8_vision", model_dir, chosen)
    found = tensors_of(folder)
    stored = load_file(checkpoint_dir / "vision" / "scales.safetensors")
    for i in range(TINY.vision_num_hidden_layers):
        for linear in VISION_LINEARS:
            name = f"vision_model.encoder.layers.{i}.{linear}"
            scale = float(stored[f"{name}.weights_scaling_factor"])
            assert same_codes(found[f"{name}.weight"], published[f"{name}.weight"], scale)
            assert float(found[f"{name}.weight_scale"]) == scale
            inputs = float(stored[f"{name}.activation_scaling_factor"])
            assert float(found[f"{name}.input_scale"]) == inputs
    ignored = config_of(folder)["quantization_config"]["ignore"]
    assert not any("vision_model" in name for name in ignored)
    assert not any(name.endswith("_scale") for name in found if name.startswith("mlp1"))


def test_the_same_bytes_come_from_model_dir_megatron_and_checkpoint_of_any_ranks(
    workshop: Workshop, tmp_path: Path
) -> None:
    """The shape is one that Megatron takes; heads of K and V are repeated at TP 4."""
    shape = replace(TINY, vision_hidden_size=256, vision_num_attention_heads=2)
    model = workshop.model("export_model", shape)
    chosen = HuggingFaceFormat(COMPRESSED_TENSORS, None, vision_format=E4M3)
    wanted = weights_of(exported(workshop, "export_of_model", model, chosen))
    write_megatron(model, tmp_path / "megatron", Layout(2))
    source = open_source(tmp_path / "megatron", tokenizer_dir=model, projector_norm_eps=1e-5)
    convert(source, tmp_path / "of_megatron", FP8, CPU, output_format=chosen)
    assert weights_of(tmp_path / "of_megatron") == wanted
    for tp_size, pp_size in ((1, 1), (4, 2)):
        ranks = replace(FP8, tp_size=tp_size, pp_size=pp_size)
        checkpoint = workshop.checkpoint(f"export_ranks_{tp_size}_{pp_size}", model, ranks)
        place = from_checkpoint(tmp_path / f"of_{tp_size}_{pp_size}", checkpoint, chosen)
        assert weights_of(place) == wanted, (tp_size, pp_size)


def weights_of(folder: Path) -> dict[str, str]:
    """Digests of weights and configuration; a manifest names its source."""
    ours = ("manifest.json", "quantization_report.html")
    return {name: digest for name, digest in tree(folder).items() if name not in ours}


def test_a_head_that_ranks_pad_comes_back_as_published(fresh: Workshop) -> None:
    model = fresh.model("model", replace(TINY, vocab_size=511))
    checkpoint = fresh.checkpoint("checkpoint", model, replace(FP8, tp_size=4))
    place = from_checkpoint(fresh.root / "out", checkpoint, HuggingFaceFormat(MODELOPT, None))
    name = "language_model.lm_head.weight"
    assert torch.equal(tensors_of(place)[name], tensors_of(model)[name].to(torch.bfloat16))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def test_shards_and_their_index_hold_every_tensor_once(
    workshop: Workshop, model_dir: Path, tmp_path: Path, scheme: Scheme
) -> None:
    chosen = HuggingFaceFormat(scheme, model_dir)
    whole = tensors_of(exported(workshop, f"export_{scheme.name}_False", model_dir, chosen))
    small = replace(chosen, max_shard_bytes=300_000)
    convert(HuggingFaceSource(model_dir), tmp_path / "out", FP8, CPU, output_format=small)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert {path.name for path in files} == set(index["weight_map"].values())
    for path in files:
        for name, tensor in load_file(path).items():
            assert index["weight_map"].pop(name) == path.name
            assert torch.equal(bits(tensor), bits(whole[name]))
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_decoder_tensors_are_written_in_the_order_of_their_file(
    model_dir: Path, tmp_path: Path, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out of order is read again for the file's SHA-256."""
    written: dict[str, None] = {}
    append = OutputFiles.append

    def noted(self: OutputFiles, file: str, name: str, block: torch.Tensor) -> None:
        written[name] = None
        append(self, file, name, block)

    monkeypatch.setattr(OutputFiles, "append", noted)
    chosen = HuggingFaceFormat(scheme, None, is_text_only=True)
    convert(open_source(model_dir), tmp_path / "export", FP8, CPU, output_format=chosen)
    with open(tmp_path / "export" / "model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__")
    assert list(written) == sorted(header, key=lambda name: header[name]["data_offsets"])


def test_a_zero_weight_has_scale_1_and_zero_codes(fresh: Workshop, scheme: Scheme) -> None:
    """ModelOpt 0.47 writes scale 0 and codes of NaN."""
    model = fresh.model("model")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    path = next(path for path in model.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, path, {"format": "pt"})
    found = tensors_of(exported(fresh, "out", model, HuggingFaceFormat(scheme, model)))
    assert float(found[name + "_scale"]) == 1.0
    assert not found[name].view(torch.uint8).any()


def test_configuration_is_the_published_one_without_rope_scaling(
    workshop: Workshop, model_dir: Path, scheme: Scheme
) -> None:
    chosen = HuggingFaceFormat(scheme, model_dir)
    found = config_of(exported(workshop, f"export_{scheme.name}_False", model_dir, chosen))
    quantization = found.pop("quantization_config")
    wanted = config_of(model_dir)
    assert wanted["llm_config"]["rope_scaling"] is not None
    wanted["llm_config"]["rope_scaling"] = None
    assert found == wanted
    assert quantization["quant_method"] == scheme.name
    assert quantization["kv_cache_scheme"]["num_bits"] == 8


def test_configuration_of_transformers_5_loses_its_scaling_too(
    fresh: Workshop, scheme: Scheme
) -> None:
    model = fresh.model("model")
    values = config_of(model)
    del values["llm_config"]["rope_scaling"]
    theta = values["llm_config"].pop("rope_theta")
    rope = {"rope_theta": theta, "rope_type": "dynamic", "type": "dynamic", "factor": 3.0}
    values["llm_config"]["rope_parameters"] = rope
    (model / "config.json").write_text(json.dumps(values))
    folder = exported(fresh, "out", model, HuggingFaceFormat(scheme, model))
    found = config_of(folder)["llm_config"]
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert found["rope_scaling"] is None


@pytest.mark.parametrize("is_text_only", [False, True], ids=["whole", "text"])
def test_modelopts_two_files_say_the_same(
    is_text_only: bool, workshop: Workshop, model_dir: Path
) -> None:
    chosen = HuggingFaceFormat(MODELOPT, model_dir, is_text_only)
    folder = exported(workshop, f"export_modelopt_{is_text_only}", model_dir, chosen)
    beside = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    inside = config_of(folder)["quantization_config"]
    head = ["lm_head"] if is_text_only else ["language_model.lm_head", "mlp1*", "vision_model*"]
    assert beside["exclude_modules"] == inside["ignore"] == head
    assert beside["quant_algo"] == inside["quant_algo"] == "FP8"
    assert beside["kv_cache_quant_algo"] == "FP8"


def test_a_cache_that_is_not_quantised_has_no_scales(
    fresh: Workshop, model_dir: Path, scheme: Scheme
) -> None:
    options = replace(FP8, kv_cache_quant_algo=None)
    chosen = HuggingFaceFormat(scheme, model_dir)
    folder = fresh.root / "out"
    convert(HuggingFaceSource(model_dir), folder, options, CPU, output_format=chosen)
    assert not config_of(folder)["quantization_config"].get("kv_cache_scheme")
    kinds = ("k_scale", "v_scale", "q_scale")
    assert not [name for name in tensors_of(folder) if name.endswith(kinds)]


def test_remote_code_comes_along_where_there_is_some(
    fresh: Workshop, scheme: Scheme, caplog: pytest.LogCaptureFixture
) -> None:
    model = fresh.model("model")
    code = "class NVLM_D_Config: ...\n"
    (model / "configuration_nvlm_d.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_nvlm_d.NVLM_D_Config"}
    published = {**config_of(model), "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps(published))
    chosen = HuggingFaceFormat(scheme, model)
    folder = exported(fresh, "whole", model, chosen)
    assert config_of(folder)["auto_map"] == auto_map
    assert (folder / "configuration_nvlm_d.py").read_text() == code
    text = exported(fresh, "text", model, replace(chosen, is_text_only=True))
    assert "auto_map" not in config_of(text)
    assert not list(text.glob("*.py"))
    (model / "configuration_nvlm_d.py").unlink()
    with caplog.at_level(logging.WARNING):
        bare = exported(fresh, "bare", model, chosen)
    assert "auto_map" not in config_of(bare)
    assert "no remote code" in caplog.text


def test_a_made_configuration_says_what_the_published_one_says(
    model_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> None:
    """A checkpoint and Megatron have no config.json of the model's own."""
    place = from_checkpoint(tmp_path / "out", checkpoint_dir, HuggingFaceFormat(MODELOPT, None))
    found, wanted = config_of(place), config_of(model_dir)
    for section in ("llm_config", "vision_config"):
        inner = found.pop(section)
        for key in inner.keys() & wanted[section].keys() - {"rope_scaling", "model_type"}:
            assert inner[key] == wanted[section][key], key
        del wanted[section]
    del found["quantization_config"]
    assert found == wanted
    assert {t.name for t in model_tensors(model_config(TINY))} <= tensors_of(place).keys()


def test_an_export_is_whole_and_current(
    workshop: Workshop, model_dir: Path, scheme: Scheme
) -> None:
    chosen = HuggingFaceFormat(scheme, model_dir)
    folder = exported(workshop, f"export_{scheme.name}_False", model_dir, chosen)
    assert verify_all(folder, "export").arguments["output_format"] == scheme.name
