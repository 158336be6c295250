"""Writes a model directory in the published layout: sharded safetensors, index, config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from build.output.safetensors_writer import SafetensorsWriter
from nvlm.formats import layout
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.formats.tensor_names import StoredTensor, model_tensors
from nvlm.model.config import NVLMConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a checkpoint; the defaults make one that runs anywhere in milliseconds."""

    vision_hidden_size: int = 96
    vision_intermediate_size: int = 192
    vision_num_hidden_layers: int = 2
    vision_num_attention_heads: int = 3
    image_size: int = 56
    patch_size: int = 14
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 512
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    max_dynamic_patch: int = 6


def config_json(shape: Shape) -> dict[str, Any]:
    """config.json as nvidia/NVLM-D-72B publishes it, stale keys included, with other sizes."""
    return {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "torch_dtype": "bfloat16",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": shape.image_size,
        "max_dynamic_patch": shape.max_dynamic_patch,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "use_thumbnail": True,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "llm_config": {
            "_name_or_path": "Qwen/Qwen2-72B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "vocab_size": shape.vocab_size,
            "max_position_embeddings": shape.max_position_embeddings,
            "rope_theta": shape.rope_theta,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "attention_bias": True,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": shape.vision_hidden_size,
            "intermediate_size": shape.vision_intermediate_size,
            "num_hidden_layers": shape.vision_num_hidden_layers,
            "num_attention_heads": shape.vision_num_attention_heads,
            "image_size": shape.image_size,
            "patch_size": shape.patch_size,
            "num_channels": 3,
            "qk_normalization": True,
            "qkv_bias": False,
            "norm_type": "rms_norm",
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "torch_dtype": "bfloat16",
        },
    }


def model_config(shape: Shape) -> NVLMConfig:
    return NVLMConfig.from_hf(config_json(shape), Path(layout.CONFIG))


def write_model_dir(
    model_dir: Path,
    shape: Shape,
    blocks_of: Callable[[StoredTensor], Iterable[torch.Tensor]],
    max_shard_bytes: int = 4_000_000_000,
) -> None:
    """Writes weights and config.json.

    `blocks_of` gives each tensor in its published dtype: whole, or blocks of rows in order.
    """
    shards = _shards(model_tensors(model_config(shape)), max_shard_bytes)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, tensors in enumerate(shards, start=1):
        file_name = layout.shard(number, len(shards))
        infos = {tensor.name: TensorInfo(tensor.dtype, tensor.shape) for tensor in tensors}
        (model_dir / file_name).unlink(missing_ok=True)
        with SafetensorsWriter(model_dir / file_name, infos) as writer:
            for tensor in tensors:
                for block in blocks_of(tensor):
                    writer.append(tensor.name, block)
        weight_map |= dict.fromkeys(infos, file_name)
        total_size += sum(info.num_bytes for info in infos.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (model_dir / layout.WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    # Last: a directory with a config.json is a whole one.
    values = config_json(shape)
    (model_dir / layout.CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def _shards(tensors: list[StoredTensor], max_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = TensorInfo(tensor.dtype, tensor.shape).num_bytes
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    return shards
