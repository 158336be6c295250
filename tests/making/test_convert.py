"""The converted checkpoint: layout, values, scales, dummy heads, memory."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.qwen2.modeling_qwen2 as hugging_face_qwen2
from PIL import Image
from safetensors.torch import load_file, save_file

from build.conversion.calibration.calibration_set import BUILT_IN, load_calibration_set
from build.conversion.convert import ConvertOptions, convert, is_up_to_date
from build.conversion.pipeline import Buffers
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats.manifest import verify_all
from nvlm.inputs.tiling import normalize
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.program.errors import UserError
from tests.conftest import BF16, CPU, FP8, FP32, MEMORY_BYTES, TINY, Workshop
from tests.reference import fp8_e4m3, internvit_float64, qwen2_hugging_face
from tests.support.cases import ONE_TILE, THREE_IMAGES, Case, ours, reference
from tests.support.tolerances import AMAX, FLOAT32_LOGITS, relative_error

DECODER = "language_model.model.layers.{i}."


@pytest.fixture(scope="module")
def published(model_dir: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor, by the safetensors library alone."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.fixture(scope="module")
def bf16_checkpoint(workshop: Workshop, model_dir: Path) -> Path:
    return workshop.checkpoint("bf16_checkpoint", model_dir, BF16)


def expected_decoder(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """TensorRT-LLM's names and layout, written out by hand."""
    p = {name: tensor.to(torch.bfloat16) for name, tensor in published.items()}
    expected = {
        "transformer.vocab_embedding.weight": p["language_model.model.embed_tokens.weight"],
        "transformer.ln_f.weight": p["language_model.model.norm.weight"],
        "lm_head.weight": p["language_model.lm_head.weight"],
    }
    for i in range(TINY.num_hidden_layers):
        hf, trt = f"language_model.model.layers.{i}.", f"transformer.layers.{i}."
        for kind in ("weight", "bias"):
            expected[f"{trt}attention.qkv.{kind}"] = torch.cat(
                [p[f"{hf}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
        expected |= {
            f"{trt}attention.dense.weight": p[f"{hf}self_attn.o_proj.weight"],
            f"{trt}mlp.fc.weight": p[f"{hf}mlp.gate_proj.weight"],
            f"{trt}mlp.gate.weight": p[f"{hf}mlp.up_proj.weight"],
            f"{trt}mlp.proj.weight": p[f"{hf}mlp.down_proj.weight"],
            f"{trt}input_layernorm.weight": p[f"{hf}input_layernorm.weight"],
            f"{trt}post_layernorm.weight": p[f"{hf}post_attention_layernorm.weight"],
        }
    return expected


def test_bf16_tensors_are_the_published_ones_under_tensorrt_llm_names(
    bf16_checkpoint: Path, published: dict[str, torch.Tensor]
) -> None:
    found, expected = load_file(bf16_checkpoint / "rank0.safetensors"), expected_decoder(published)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], tensor), name


def test_fp8_weights_are_the_nearest_e4m3_of_the_bf16_values_over_amax(
    checkpoint_dir: Path, published: dict[str, torch.Tensor]
) -> None:
    found, expected = load_file(checkpoint_dir / "rank0.safetensors"), expected_decoder(published)
    # Linears that share a scale stand together.
    groups = (("attention.qkv",), ("attention.dense",), ("mlp.fc", "mlp.gate"), ("mlp.proj",))
    for i in range(TINY.num_hidden_layers):
        for group in groups:
            names = [f"transformer.layers.{i}.{linear}" for linear in group]
            amax = max(float(expected[f"{name}.weight"].abs().max()) for name in names)
            for name in names:
                scale = float(found[f"{name}.weights_scaling_factor"])
                assert scale == fp8_e4m3.linear_scale(amax, "bfloat16")
                codes = fp8_e4m3.quantize(expected[f"{name}.weight"].float().numpy(), scale)
                assert np.array_equal(found[f"{name}.weight"].view(torch.uint8).numpy(), codes)


def test_config_json_has_the_keys_tensorrt_llm_needs(checkpoint_dir: Path) -> None:
    config = json.loads((checkpoint_dir / "config.json").read_text())
    assert config["architecture"] == "Qwen2ForCausalLM"
    assert config["qwen_type"] == "qwen2"
    assert config["position_embedding_type"] == "rope_gpt_neox"
    assert config["rotary_scaling"] is None
    assert config["max_position_embeddings"] == 32768
    assert config["quantization"] == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    assert config["mapping"] == {"world_size": 1, "tp_size": 1, "pp_size": 1, "cp_size": 1}
    assert (config["hidden_size"], config["head_size"]) == (TINY.hidden_size, 32)


def hugging_face_maxima(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What enters each linear and the cache when the calibration set runs through transformers."""
    source = HuggingFaceSource(model_dir)
    tokenizer = Tokenizer(model_dir)
    samples = load_calibration_set(BUILT_IN, FP8.calib_size, source.config, tokenizer).samples
    model = qwen2_hugging_face.load(model_dir)
    maxima: dict[str, float] = {}
    layer = 0

    def see(name: str, x: torch.Tensor) -> None:
        maxima[name] = max(maxima.get(name, 0.0), float(x.abs().max()))

    rotate = hugging_face_qwen2.apply_rotary_pos_emb

    def seeing_rotate(q: torch.Tensor, k: torch.Tensor, *rest: Any, **named: Any) -> Any:
        q, k = rotate(q, k, *rest, **named)
        see(f"{layer}.q", q)
        see(f"{layer}.k", k)
        return q, k

    monkeypatch.setattr(hugging_face_qwen2, "apply_rotary_pos_emb", seeing_rotate)
    for i, block in enumerate(model.model.layers):

        def enter(_: Any, __: Any, i: int = i) -> None:
            nonlocal layer
            layer = i

        block.register_forward_pre_hook(enter)
        for ours_name, module in {
            "attention.qkv": block.self_attn.q_proj,
            "attention.dense": block.self_attn.o_proj,
            "mlp.fc": block.mlp.gate_proj,
            "mlp.gate": block.mlp.up_proj,
            "mlp.proj": block.mlp.down_proj,
        }.items():
            module.register_forward_pre_hook(
                lambda _, inputs, name=f"{i}.{ours_name}": see(name, inputs[0])
            )
        block.self_attn.v_proj.register_forward_hook(
            lambda _, __, output, name=f"{i}.v": see(name, output)
        )
    for sample in samples:
        embeddings = None
        if sample.num_tiles:
            tiles = normalize(sample.load_tiles()).numpy()
            embeddings = internvit_float64.encode_tiles(model_dir, tiles)
            embeddings = embeddings.reshape(-1, embeddings.shape[-1])
        token_ids = [min(token_id, TINY.vocab_size - 1) for token_id in sample.prompt.token_ids]
        pad = TINY.vocab_size - 1
        inputs = qwen2_hugging_face.embed(
            model, token_ids, None if embeddings is None else pad, embeddings
        )
        qwen2_hugging_face.all_logits(model, inputs)
    return maxima


def test_activation_and_cache_scales_are_the_amax_of_transformers_on_the_same_samples(
    model_dir: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(FP8, dtype="float32")
    checkpoint = workshop.checkpoint("fp8_in_float32", model_dir, options)
    found = load_file(checkpoint / "rank0.safetensors")
    maxima = hugging_face_maxima(model_dir, monkeypatch)
    for i in range(TINY.num_hidden_layers):
        prefix = f"transformer.layers.{i}."
        for linear in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
            scale = float(found[f"{prefix}{linear}.activation_scaling_factor"])
            assert scale == pytest.approx(maxima[f"{i}.{linear}"] / 448, rel=AMAX), linear
        cache = max(maxima[f"{i}.{kind}"] for kind in "qkv")
        scale = float(found[f"{prefix}attention.kv_cache_scaling_factor"])
        assert scale == pytest.approx(cache / 448, rel=AMAX)


def test_vision_tensors_are_the_published_ones_without_the_zero_heads(
    bf16_checkpoint: Path, published: dict[str, torch.Tensor]
) -> None:
    found = load_file(bf16_checkpoint / "vision" / "model.safetensors")
    names = {name for name in published if not name.startswith("language_model.")}
    assert found.keys() == names
    real = TINY.vision_hidden_size
    stored = real + 7 * 32
    for name in names:
        expected = published[name].to(torch.bfloat16)
        if name.endswith("attn.qkv.weight"):
            q, k, v = (expected[i * stored : i * stored + real] for i in range(3))
            expected = torch.cat([q, k, v])
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            expected = expected[:real]
        elif name.endswith("attn.proj.weight"):
            expected = expected[:, :real]
        assert found[name].shape == expected.shape, name
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("kind", ["attn.qkv.weight", "attn.k_norm.weight", "attn.proj.weight"])
def test_dummy_heads_that_are_not_zero_are_kept_and_reported(
    kind: str, fresh: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(4, 2, 32, ONE_TILE, seed=7)
    model_dir = fresh.model("model", case.shape, seed=7)
    name = f"vision_model.encoder.layers.1.{kind}"
    path = next(p for p in model_dir.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = 0.5  # the last entry belongs to the last dummy head
    save_file(tensors, path, {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        checkpoint = fresh.checkpoint("checkpoint", model_dir, FP32)
    assert f"{name} is not zero" in caplog.text
    assert "keeping all 10 heads" in caplog.text
    stored = load_file(checkpoint / "vision" / "model.safetensors")
    assert stored[name].shape == tensors[name].shape

    engine = fresh.engine("engine", checkpoint, vision="torch")
    answer, expected = ours(engine, case, 8), reference(model_dir, case)
    tokens, logits = qwen2_hugging_face.greedy(expected.model, expected.inputs_embeds, 8)
    assert answer.token_ids == tokens
    assert relative_error(answer.logits, logits) <= FLOAT32_LOGITS


class CountingSource:
    """Gives every tensor memory of its own and sees, at each read, which are still alive."""

    def __init__(self, source: HuggingFaceSource) -> None:
        self._source = source
        self.config, self.tokenizer_dir = source.config, source.tokenizer_dir
        self._layer_of: dict[int, str] = {}  # by address
        self.layers: set[str] = set()
        self.alive: list[dict[str, int]] = []  # at each read: layer -> tensors

    def read(self, name: str) -> torch.Tensor:
        gc.collect()
        addresses = {
            x.untyped_storage().data_ptr()
            for x in gc.get_objects()
            if type(x) in (torch.Tensor, torch.nn.Parameter) and not x.is_meta
        }
        layers = [self._layer_of[address] for address in addresses & self._layer_of.keys()]
        self.alive.append({layer: layers.count(layer) for layer in layers})
        tensor = self._source.read(name).clone()
        layer = re.match(r".*layers\.\d+", name)
        self._layer_of[tensor.untyped_storage().data_ptr()] = layer[0] if layer else name
        if layer:
            self.layers.add(layer[0])
        return tensor

    def provenance(self) -> dict[str, Any]:
        return self._source.provenance()


@pytest.fixture
def frozen_gc() -> Iterator[None]:
    """Objects made before the test are left out of collections and of `gc.get_objects`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_gc")
def test_one_layer_and_what_is_read_ahead_are_alive(fresh: Workshop) -> None:
    """With the smallest buffers: one tensor waits and one is being read while a layer runs."""
    depth = 5
    shape = replace(TINY, num_hidden_layers=depth, vision_num_hidden_layers=depth)
    source = CountingSource(HuggingFaceSource(fresh.model("model", shape)))
    options = replace(FP8, calib_size=1)
    convert(source, fresh.root / "out", options, CPU, buffers=Buffers(0, 0))
    assert len(source.layers) == 2 * depth
    assert max(sum(counts.values()) for counts in source.alive) >= 9, "a whole layer is seen"
    for counts in source.alive:
        others = sorted(counts.values())[:-1]
        assert sum(others) <= 4, f"alive together: {counts}"


def test_the_same_input_gives_the_same_bytes(
    checkpoint_dir: Path, fresh: Workshop, model_dir: Path
) -> None:
    again = fresh.checkpoint("again", model_dir, FP8)
    assert verify_all(again, "checkpoint").files == verify_all(checkpoint_dir, "checkpoint").files


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_converts_and_answers(dtype: str, workshop: Workshop, model_dir: Path) -> None:
    case = Case(4, 2, 32, THREE_IMAGES, seed=0)
    options = ConvertOptions(None, None, dtype)
    checkpoint = workshop.checkpoint(f"plain_{dtype}", model_dir, options)
    engine = workshop.engine(f"plain_engine_{dtype}", checkpoint, vision="torch", max_num_images=3)
    stored = load_file(engine / "llm" / "rank0.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    assert len(ours(engine, case, 3).token_ids) == 3


def test_a_checkpoint_that_is_quantised_already_is_refused(fresh: Workshop) -> None:
    """Published FP8 variants keep their scales in tensors of other names."""
    model_dir = fresh.model("model")
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    path = next(p for p in model_dir.glob("*.safetensors") if name in load_file(p))
    tensors = load_file(path)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is stored as .*give the unquantised checkpoint"):
        HuggingFaceSource(model_dir)


def change_tokenizer(model_dir: Path, _: Path) -> None:
    path = model_dir / "tokenizer_config.json"
    path.write_text(path.read_text() + "\n")


def change_shard(model_dir: Path, _: Path) -> None:
    path = sorted(model_dir.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes())  # the same size, another time


def change_calibration_image(_: Path, calibration: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(calibration.parent / "image.png")


@pytest.mark.parametrize("change", [change_tokenizer, change_shard, change_calibration_image])
def test_any_change_of_the_input_makes_a_checkpoint_stale(
    change: Callable[[Path, Path], None], fresh: Workshop
) -> None:
    model_dir = fresh.model("model")
    calibration = fresh.root / "calibration.jsonl"
    calibration.write_text('{"prompt": "What is it?", "images": ["image.png"]}')
    Image.new("RGB", (60, 60), "blue").save(fresh.root / "image.png")
    options = ConvertOptions(calib_data=calibration)
    checkpoint = fresh.checkpoint("checkpoint", model_dir, options)
    assert is_up_to_date(HuggingFaceSource(model_dir), checkpoint, options)
    change(model_dir, calibration)
    assert not is_up_to_date(HuggingFaceSource(model_dir), checkpoint, options)


def test_an_engine_keeps_the_digests_of_what_it_carries_over(fresh: Workshop) -> None:
    """A checkpoint damaged between the two steps does not become a sound engine."""
    checkpoint = fresh.checkpoint("checkpoint", fresh.model("model"), BF16)
    options = BuildOptions(vision="torch")
    spec = specify(checkpoint, options, CPU, MEMORY_BYTES)
    path = checkpoint / "rank0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    build_engine(spec, fresh.root / "engine", options)
    with pytest.raises(UserError, match=r"rank0\.safetensors has changed"):
        verify_all(fresh.root / "engine", "engine")
