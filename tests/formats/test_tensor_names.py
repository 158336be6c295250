"""The name tables against the published facts of nvidia/NVLM-D-72B."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors, vision_tensors
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    DECODER_PREFIX,
    ENGINE_LAYER,
    ENGINE_LAYER_TENSORS,
    ENGINE_TOP_TENSORS,
    StoredTensor,
    model_tensors,
)
from nvlm.model.config import NVLMConfig
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import config_json


def engine_slots(config: NVLMConfig) -> dict[str, tuple[str, int]]:
    """Published name -> (name in the checkpoint directory, position in that tensor's stack).

    Vision and projector tensors keep their names (in `vision/model.safetensors`).
    """
    slots: dict[str, tuple[str, int]] = {}
    for tensor in ENGINE_TOP_TENSORS:
        slots[tensor.sources[0]] = (tensor.name, 0)
    for i in range(config.decoder.num_hidden_layers):
        for tensor in ENGINE_LAYER_TENSORS:
            for position, source in enumerate(tensor.sources):
                name = DECODER_LAYER.format(i=i) + source
                slots[name] = (ENGINE_LAYER.format(i=i) + tensor.name, position)
    for stored in model_tensors(config):
        if not stored.name.startswith(DECODER_PREFIX):
            slots[stored.name] = (stored.name, 0)
    return slots


@pytest.fixture(scope="module")
def config() -> NVLMConfig:
    return NVLMConfig.from_hf(config_json(PRESETS["72b"]), Path("config.json"))


@pytest.fixture(scope="module")
def tensors(config: NVLMConfig) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in model_tensors(config)}


def test_the_72b_checkpoint_has_1556_tensors_of_the_published_byte_count(
    config: NVLMConfig, tensors: dict[str, StoredTensor]
) -> None:
    """metadata.total_size of the published index: counts every shape and every F32 and BF16."""
    assert len(tensors) == len(model_tensors(config)) == 1556
    size = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    assert size == 176_901_927_168


def test_float32_is_stored_exactly_for_the_attention_tensors_that_are_published_so(
    tensors: dict[str, StoredTensor],
) -> None:
    float32 = re.compile(
        r"language_model\.model\.layers\.\d+\.self_attn\.[qkv]_proj\.(weight|bias)"
        r"|vision_model\.encoder\.layers\.\d+\.attn\.(qkv|q_norm|k_norm|proj)\.weight"
    )
    for name, tensor in tensors.items():
        expected = torch.float32 if float32.fullmatch(name) else torch.bfloat16
        assert tensor.dtype == expected, name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vision_model.embeddings.class_embedding", (1, 1, 3200)),
        ("vision_model.embeddings.position_embedding", (1, 1025, 3200)),
        ("vision_model.encoder.layers.44.attn.qkv.weight", (12288, 3200)),
        ("vision_model.encoder.layers.0.attn.proj.weight", (3200, 4096)),
        ("mlp1.1.weight", (29568, 12800)),
        ("mlp1.3.weight", (8192, 29568)),
        ("language_model.model.layers.79.self_attn.k_proj.weight", (1024, 8192)),
        ("language_model.model.layers.0.mlp.down_proj.weight", (8192, 29568)),
        ("language_model.lm_head.weight", (152064, 8192)),
    ],
)
def test_shapes_are_the_published_ones(
    tensors: dict[str, StoredTensor], name: str, shape: tuple[int, ...]
) -> None:
    assert tensors[name].shape == shape


def test_every_published_tensor_has_one_place_and_every_place_one_tensor(
    config: NVLMConfig, tensors: dict[str, StoredTensor]
) -> None:
    slots = engine_slots(config)
    assert slots.keys() == tensors.keys()
    assert len(set(slots.values())) == 1556


def test_the_places_are_the_tensors_of_a_converted_checkpoint(config: NVLMConfig) -> None:
    decoder = decoder_tensors(CheckpointConfig(config.decoder, "bfloat16", None, None))
    vision = vision_tensors(config.vision, torch.bfloat16)
    assert {name for name, _ in engine_slots(config).values()} == decoder.keys() | vision.keys()


def test_stacked_parts_fill_their_tensor_exactly(
    config: NVLMConfig, tensors: dict[str, StoredTensor]
) -> None:
    decoder = decoder_tensors(CheckpointConfig(config.decoder, "bfloat16", None, None))
    rows: dict[str, int] = {}
    for source, (name, _) in engine_slots(config).items():
        rows[name] = rows.get(name, 0) + tensors[source].shape[0]
    for name, info in decoder.items():
        assert rows[name] == info.shape[0], name
