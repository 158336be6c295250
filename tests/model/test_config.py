"""Reading config.json: the published file and what differs from it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

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
        (None, "quantization_config", {"quant_method": "gptq", "bits": 4}),
        (None, "compression_config", {"quant_method": "compressed-tensors"}),
        ("llm_config", "quantization_config", {"quant_method": "fp8"}),
        ("vision_config", "quantization_config", {"quant_method": "fp8"}),
        ("llm_config", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("llm_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("llm_config", "rope_scaling", {"type": "dynamic", "rope_type": "linear", "factor": 3.0}),
        ("llm_config", "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("llm_config", "rope_scaling", "dynamic"),
        ("llm_config", "rope_parameters", {"rope_type": "linear", "factor": 3.0}),
        ("llm_config", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
        ("llm_config", "rope_parameters", {"rope_type": "default", "rope_theta": "1e6"}),
        ("llm_config", "rope_parameters", ["default"]),
        ("llm_config", "layer_types", ["full_attention", "sliding_attention"]),
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


def saved_by_transformers(llm: dict[str, Any]) -> dict[str, Any]:
    """The decoder's part as this release of transformers writes it."""
    return json.loads(Qwen2Config(**llm).to_json_string(use_diff=False))


def without(llm: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in llm.items() if key not in keys}


ROPE = ("rope_theta", "rope_scaling")
# How others write what the published file says.
OTHERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "rope_type": lambda llm: {**llm, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "both_types": lambda llm: {
        **llm,
        "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 3.0},
    },
    "default": lambda llm: {**llm, "rope_scaling": {"rope_type": "default"}},
    "no_scaling": lambda llm: without(llm, "rope_scaling"),
    "rope_parameters": lambda llm: {
        **without(llm, *ROPE),
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e6},
    },
    "rope_parameters_and_rope_theta": lambda llm: {
        **without(llm, "rope_scaling"),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "rope_parameters_alone_beside_rope_theta": lambda llm: {
        **without(llm, "rope_scaling"),
        "rope_parameters": {"rope_type": "default"},
    },
    "dtype": lambda llm: {**without(llm, "torch_dtype"), "dtype": "bfloat16"},
    "transformers": saved_by_transformers,
    "transformers_without_architectures": lambda llm: {
        **without(saved_by_transformers(llm), "architectures"),
        "model_type": "qwen2",
    },
}


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_a_config_as_others_write_it_means_the_published_one(
    values: dict[str, Any], write: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    expected = NVLMConfig.from_hf(values, PATH)
    values = {**without(values, "torch_dtype"), "dtype": "bfloat16"}
    values["architectures"] = ["NVLM_D_Model"]
    values["llm_config"] = write(values["llm_config"])
    assert NVLMConfig.from_hf(values, PATH) == expected


def test_a_decoder_that_names_no_architecture_must_be_of_type_qwen2(values: dict[str, Any]) -> None:
    values["llm_config"]["architectures"] = None
    with pytest.raises(UserError, match=r"llm_config\.model_type is 'llama', expected 'qwen2'"):
        NVLMConfig.from_hf(values, PATH)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("llm_config", "hidden_size"),
        ("llm_config", "rope_theta"),
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
