"""A checkpoint with random weights in the published layout of NVLM-D-72B, of any size.

Same tensor names, F32/BF16 mix, zero dummy heads, sharded safetensors with an index, config.json
and tokenizer. For tests, benchmarks and, until real weights are at hand, for trying the commands.

    python -m tools.make_random_checkpoint --output_dir D [--preset tiny|demo|small|72b] [--seed N]
        [--num_hidden_layers N] [--vision_num_hidden_layers N]    # fewer layers of the real width
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nvlm.config import NUM_DUMMY_HEADS, NVLMConfig
from nvlm.safetensors_files import SafetensorsWriter, TensorInfo
from nvlm.tensor_names import StoredTensor, model_tensors
from tools.make_tokenizer import write_tokenizer


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


_MAX_BLOCK_VALUES = 1 << 26

PRESETS = {
    "tiny": Shape(),
    # Exports to ONNX in seconds.
    "demo": Shape(vision_num_hidden_layers=1),
    # Wide enough that time goes where it goes in the real model, small enough for a laptop.
    "small": Shape(
        vision_hidden_size=400,
        vision_intermediate_size=1600,
        vision_num_hidden_layers=4,
        vision_num_attention_heads=25,
        image_size=448,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "72b": Shape(
        vision_hidden_size=3200,
        vision_intermediate_size=12800,
        vision_num_hidden_layers=45,
        vision_num_attention_heads=25,
        image_size=448,
        hidden_size=8192,
        intermediate_size=29568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=152064,
    ),
}


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


def write_random_checkpoint(
    model_dir: Path,
    shape: Shape,
    *,
    seed: int = 0,
    max_shard_bytes: int = 4_000_000_000,
    tokenizer_dir: Path | None = None,
) -> None:
    """Writes a whole model directory; with `tokenizer_dir`, that tokenizer is copied into it."""
    model_dir.mkdir(parents=True, exist_ok=True)
    values = config_json(shape)
    config = NVLMConfig.from_hf(values, model_dir / "config.json")
    if tokenizer_dir is None:
        num_tokens = write_tokenizer(model_dir)
        assert num_tokens <= shape.vocab_size, f"{num_tokens} tokens, {shape.vocab_size} rows"
    else:
        for path in tokenizer_dir.glob("tokenizer*.json"):
            shutil.copy(path, model_dir)
    _write_shards(model_dir, _shards(model_tensors(config), max_shard_bytes), config, seed)
    # Last: a directory with a config.json is a whole one.
    (model_dir / "config.json").write_text(json.dumps(values, indent=2) + "\n")


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


def _write_shards(
    model_dir: Path, shards: list[list[StoredTensor]], config: NVLMConfig, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    total_size = 0
    for number, tensors in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        infos = {tensor.name: TensorInfo(tensor.dtype, tensor.shape) for tensor in tensors}
        (model_dir / file_name).unlink(missing_ok=True)
        with SafetensorsWriter(model_dir / file_name, infos) as writer:
            for tensor in tensors:
                for part in _row_blocks(tensor):
                    writer.append(tensor.name, random_tensor(part, config, generator))
        weight_map |= dict.fromkeys(infos, file_name)
        total_size += sum(info.num_bytes for info in infos.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _row_blocks(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """Parts of a large tensor that does not fit in memory as float32, in order; else itself."""
    rows = max(1, _MAX_BLOCK_VALUES // math.prod(tensor.shape[1:]))
    if rows >= tensor.shape[0] or tensor.name.startswith("vision_model."):  # dummy heads
        yield tensor
        return
    for start in range(0, tensor.shape[0], rows):
        count = min(rows, tensor.shape[0] - start)
        yield replace(tensor, shape=(count, *tensor.shape[1:]))


def random_tensor(
    tensor: StoredTensor, config: NVLMConfig, generator: torch.Generator
) -> torch.Tensor:
    """Values that keep activations near 1: linears N(0, 1 / fan_in), norms near 1, dummies 0.

    Small embeddings and sharp attention make the answer depend on the whole prompt; otherwise a
    random model soon repeats itself.
    """
    values = torch.randn(tensor.shape, generator=generator)
    kind = tensor.name.split(".")
    if (len(tensor.shape) == 1 and "norm" in tensor.name) or tensor.name == "mlp1.0.weight":
        values = 1.0 + 0.1 * values
    elif tensor.name.endswith("lm_head.weight"):
        values *= 3.0 * tensor.shape[1] ** -0.5
    elif kind[-2] == "embed_tokens":
        values *= 0.3
    elif kind[-2] in ("q_proj", "k_proj") and len(tensor.shape) == 2:
        values *= 2.0 * tensor.shape[1] ** -0.5
    elif len(tensor.shape) == 2:
        values *= tensor.shape[1] ** -0.5
    elif len(tensor.shape) == 4:
        values *= (3 * tensor.shape[2] * tensor.shape[3]) ** -0.5
    elif kind[-1] in ("bias", "ls1", "ls2"):
        values *= 0.2
    return _zero_dummy_heads(tensor.name, values, config).to(tensor.dtype)


def _zero_dummy_heads(name: str, values: torch.Tensor, config: NVLMConfig) -> torch.Tensor:
    """The last `NUM_DUMMY_HEADS` heads of q, k, v and of the projection's columns are zero."""
    real = config.vision.hidden_size
    assert config.vision.num_dummy_heads == NUM_DUMMY_HEADS
    if name.endswith(("attn.q_norm.weight", "attn.k_norm.weight")):
        values[real:] = 0
    elif name.endswith("attn.qkv.weight"):
        values.view(3, -1, real)[:, real:] = 0
    elif name.endswith("attn.proj.weight"):
        values[:, real:] = 0
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    depths = ("num_hidden_layers", "vision_num_hidden_layers")
    for name in depths:
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in depths if getattr(arguments, name)}
    shape = replace(PRESETS[arguments.preset], **given)
    write_random_checkpoint(arguments.output_dir, shape, seed=arguments.seed)


if __name__ == "__main__":
    main()
