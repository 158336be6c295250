"""bfloat16 and FP8 engines against the float32 reference, and FP8 against its own definition."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from build.conversion.convert import ConvertOptions
from nvlm.formats.kv_cache import EngineKVCache
from runtime.decoder.executor import DecoderRequest, create_decoder_executor
from runtime.engine.engine_dir import EngineDir
from tests.conftest import BF16, Workshop
from tests.reference import qwen2_float64, qwen2_hugging_face
from tests.reference.qwen2_float64 import Fp8Scales, LinearScales
from tests.support.cases import CASES, Case, reference, teacher_forced
from tests.support.tolerances import (
    BF16_LOGITS,
    BF16_TOP1,
    FP8_DEFINITION,
    FP8_DEFINITION_SHARE,
    FP8_DEFINITION_SHARE_DEEP,
    FP8_FLIPPED,
    FP8_LOGITS,
    FP8_TOP1,
    FP8_VISION_LOGITS,
    relative_error,
)

NUM_STEPS = 16
SHARED = CASES[::5]  # every GQA ratio, 1, 3 and no images, 56 and 112 px
FP8 = ConvertOptions()


@pytest.mark.parametrize(
    ("precision", "options", "vision_precision", "tolerance", "top1"),
    [
        ("bf16", BF16, "bfloat16", BF16_LOGITS, BF16_TOP1),
        ("fp8", FP8, "bfloat16", FP8_LOGITS, FP8_TOP1),
        ("fp8_vision", FP8, "FP8", FP8_VISION_LOGITS, FP8_TOP1),
    ],
)
def test_logits_stay_close_to_the_float32_reference(
    precision: str,
    options: ConvertOptions,
    vision_precision: str,
    tolerance: float,
    top1: float,
    workshop: Workshop,
) -> None:
    agreements = []
    for case in SHARED:
        model_dir = workshop.model(f"model-{case.name}", case.shape, seed=case.seed)
        checkpoint = workshop.checkpoint(f"{options.quant_algo}-{case.name}", model_dir, options)
        engine = workshop.engine(
            f"{precision}-{case.name}",
            checkpoint,
            vision="torch",
            vision_precision=vision_precision,
            max_num_images=3,
        )
        expected = reference(model_dir, case)
        tokens, wanted = qwen2_hugging_face.greedy(
            expected.model, expected.inputs_embeds, NUM_STEPS
        )
        found, _ = teacher_forced(engine, case, tokens)
        error = relative_error(found, wanted)
        agreements.append(float((found.argmax(-1) == wanted.argmax(-1)).float().mean()))
        print(f"{precision} {case.name}: error {error:.4f}, top-1 {agreements[-1]:.3f}")
        assert error <= tolerance, case.name
    assert np.mean(agreements) >= top1


def checkpoint_scales(path: Path, num_layers: int) -> Fp8Scales:
    """The scales of a checkpoint, read by the safetensors library alone."""
    with safe_open(path, framework="np") as file:

        def scale(name: str) -> float:
            return float(file.get_tensor(name)[0])

        def linear(name: str) -> LinearScales:
            return LinearScales(
                scale(f"{name}.weights_scaling_factor"), scale(f"{name}.activation_scaling_factor")
            )

        linears, kv_cache = [], []
        for i in range(num_layers):
            layer = f"transformer.layers.{i}"
            assert linear(f"{layer}.mlp.fc") == linear(f"{layer}.mlp.gate")
            linears.append(
                {
                    "qkv": linear(f"{layer}.attention.qkv"),
                    "dense": linear(f"{layer}.attention.dense"),
                    "fc_gate": linear(f"{layer}.mlp.fc"),
                    "proj": linear(f"{layer}.mlp.proj"),
                }
            )
            kv_cache.append((scale(f"{layer}.attention.kv_cache_scaling_factor"),) * 2)
    return Fp8Scales(tuple(linears), tuple(kv_cache))


def own_scales(report: Path, num_layers: int) -> tuple[tuple[float, float], ...]:
    """Scales of K and V: amax / 448 in float32, as the report of a conversion has amax."""
    rows = {row["layer"]: row for row in json.loads(report.read_text())["attention"]}
    layers = [rows[f"transformer.layers.{i}.attention"] for i in range(num_layers)]
    most = np.float32(448)
    return tuple(
        (float(np.float32(row["k_amax"]) / most), float(np.float32(row["v_amax"]) / most))
        for row in layers
    )


CACHES = ("one scale", "own scales", "in dtype")
"""Forms of the KV cache."""


def definition_errors(case: Case, workshop: Workshop, cache: str = CACHES[0]) -> list[float]:
    """Relative logit error at each step against the float64 model of the checkpoint's FP8.

    In float32, so that FP8 is the only rounding, and on the reference's own image embeddings:
    an input that differs in its last bit may round to another e4m3 value.
    """
    model_dir = workshop.model(f"model-{case.name}", case.shape, seed=case.seed)
    options = replace(FP8, dtype="float32")
    checkpoint = workshop.checkpoint(f"fp8_in_float32-{case.name}", model_dir, options)
    chosen: dict[str, object] = {"kv_cache_scales": "own"} if cache == "own scales" else {}
    name = f"fp8_in_float32_engine{'_own' if chosen else ''}-{case.name}"
    engine_dir = workshop.engine(name, checkpoint, vision="torch", max_num_images=3, **chosen)
    engine = EngineDir.read(engine_dir)
    if cache == "in dtype":
        in_dtype = replace(engine.checkpoint_config, kv_cache=EngineKVCache(in_dtype=True))
        engine = replace(engine, checkpoint_config=in_dtype)
    expected = reference(model_dir, case)
    tokens, _ = qwen2_hugging_face.greedy(expected.model, expected.inputs_embeds, NUM_STEPS)
    rows = expected.inputs_embeds[0]
    table = rows[[i for i, token in enumerate(expected.token_ids) if token is None]]
    virtual = itertools.count(case.shape.vocab_size)
    prompt = [next(virtual) if token is None else token for token in expected.token_ids]
    decoder = create_decoder_executor(engine, torch.device("cpu"))
    found = []
    for step in range(NUM_STEPS):
        token_ids = prompt + tokens[:step]
        decoder.submit(DecoderRequest(token_ids, 1, prompt_table=table, return_logits=True))
        found.append(decoder.step()[0].logits)

    config, weights = qwen2_float64.load(model_dir)
    inputs = np.concatenate([rows.double().numpy(), qwen2_float64.embed(weights, tokens[:-1])])
    num_layers = case.shape.num_hidden_layers
    scales = checkpoint_scales(checkpoint / "rank0.safetensors", num_layers)
    if cache == "own scales":
        own = own_scales(checkpoint / "quantization_report.json", num_layers)
        assert all(min(pair) < one for pair, (one, _) in zip(own, scales.kv_cache, strict=True))
        scales = replace(scales, kv_cache=own)
    elif cache == "in dtype":
        scales = replace(scales, kv_cache=())
    wanted = qwen2_float64.logits(config, weights, inputs, scales, num_last=NUM_STEPS)
    return [relative_error(f, torch.from_numpy(w)) for f, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_fp8_computes_exactly_what_the_checkpoint_says(
    case: Case, cache: str, workshop: Workshop
) -> None:
    """One layer, so that a value that falls on the other side of the middle between two e4m3
    numbers (1e-7 is enough) disturbs its own position and is not carried through the model."""
    errors = definition_errors(replace(case, num_layers=1), workshop, cache)

    exact = np.mean(np.array(errors) <= FP8_DEFINITION)
    print(f"{exact:.3f} of {len(errors)} positions exact, largest error {max(errors):.1e}")
    assert exact >= FP8_DEFINITION_SHARE
    assert max(errors) <= FP8_FLIPPED


def test_fp8_of_several_layers_is_as_exact_where_nothing_flips(workshop: Workshop) -> None:
    errors = [error for case in SHARED for error in definition_errors(case, workshop)]
    assert np.mean(np.array(errors) <= FP8_DEFINITION) >= FP8_DEFINITION_SHARE_DEEP
