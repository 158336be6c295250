"""Reading config.json: the published file and what differs from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from nvlm.model.config import NVLMConfig
from nvlm.program.errors import UserError
from tools.make_random_checkpoint import PRESETS
from tools.model_dir import config_json

PATH = Path("model/config.json")


@pytest.fixture
def values() -> dict[str, Any]:
    return copy.deepcopy(config_json(PRESETS["72b"]))


def test_the_published_config_gives_the_published_sizes(values: dict[str, Any]) -> None:
    config = NVLMConfig.from_hf(values, PATH)
    assert (config.vision.head_dim, config.vision.num_stored_heads) == (128, 32)
    assert (config.vision.tokens_per_tile, config.vision.num_positions) == (256, 1025)
    assert config.vision.projector_input_size == 12800
    assert config.vision.projector_hidden_size == 29568
    assert config.decoder.head_dim == 128
    assert config.tiling.max_tiles_per_image == 7
    assert config.vision.projector_norm_eps == 1e-5
    assert config.vision.norm_eps == config.decoder.rms_norm_eps == 1e-6


def test_a_stale_llama_model_type_is_accepted_because_the_architecture_says_qwen2(
    values: dict[str, Any],
) -> None:
    assert values["llm_config"]["model_type"] == "llama"
    NVLMConfig.from_hf(values, PATH)
    values["llm_config"]["architectures"] = ["LlamaForCausalLM"]
    with pytest.raises(UserError, match=r"llm_config\.architectures.*Qwen2ForCausalLM"):
        NVLMConfig.from_hf(values, PATH)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "model_type", "internvl_chat"),
        (None, "ps_version", "v1"),
        (None, "select_layer", -4),
        (None, "use_thumbnail", False),
        (None, "downsample_ratio", 1.0),
        (None, "architectures", ["InternVLChatModel"]),
        (None, "min_dynamic_patch", 3),
        (None, "use_llm_lora", 16),
        ("llm_config", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("llm_config", "hidden_act", "gelu"),
        ("llm_config", "tie_word_embeddings", True),
        ("llm_config", "use_sliding_window", True),
        ("llm_config", "num_hidden_layers", 0),
        ("llm_config", "num_key_value_heads", 7),
        ("llm_config", "rope_theta", "1e6"),
        ("vision_config", "norm_type", "layer_norm"),
        ("vision_config", "qk_normalization", False),
        ("vision_config", "qkv_bias", True),
        ("vision_config", "hidden_act", "quick_gelu"),
        ("vision_config", "image_size", 449),
        ("vision_config", "num_attention_heads", True),
    ],
)
def test_a_value_that_would_alter_the_computation_is_refused_by_name(
    values: dict[str, Any], section: str | None, key: str, value: object
) -> None:
    (values if section is None else values[section])[key] = value
    with pytest.raises(UserError, match=rf"model/config\.json: .*{key}"):
        NVLMConfig.from_hf(values, PATH)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("llm_config", "hidden_size"),
        ("llm_config", "vocab_size"),
        ("llm_config", "rms_norm_eps"),
        ("vision_config", "patch_size"),
        ("vision_config", "layer_norm_eps"),
        ("vision_config", "qk_normalization"),
    ],
)
def test_a_missing_key_is_named(values: dict[str, Any], section: str, key: str) -> None:
    del values[section][key]
    with pytest.raises(UserError, match=rf"{section}\.{key} is missing"):
        NVLMConfig.from_hf(values, PATH)
