"""What TensorRT-LLM 1.2.1's QWenForCausalLM expects in rank{r}.safetensors, written by hand.

From models/qwen/model.py, layers/attention.py, layers/mlp.py and quantization/layers.py there.
rank = pp_rank * tp + tp_rank; layers count from 0 on each stage; types as safetensors spells them.
"""

from __future__ import annotations

import json
import math
import struct
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

Expected = dict[str, tuple[str, list[int]]]


def expected_tensors(
    config: dict[str, Any],
    tp: int,
    pp: int,
    rank: int,
    *,
    fp8: bool,
    kv_fp8: bool,
    fp8_head: bool = False,
) -> Expected:
    """Name -> (type, shape). `config` is llm_config of the model's config.json. fp8_head: lm_head
    is an FP8Linear."""
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    d = hidden // config["num_attention_heads"]
    a = config["num_attention_heads"] // tp
    k = max(config["num_key_value_heads"], tp) // tp
    vocabulary = config["vocab_size"]
    weight = "F8_E4M3" if fp8 else "BF16"
    stage, stages = rank // tp, pp
    tensors: Expected = {}
    if stage == 0:
        tensors["transformer.vocab_embedding.weight"] = ("BF16", [vocabulary, hidden])
    for i in range(config["num_hidden_layers"] // pp):
        layer = f"transformer.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = ("BF16", [hidden])
        tensors[f"{layer}.post_layernorm.weight"] = ("BF16", [hidden])
        tensors[f"{layer}.attention.qkv.weight"] = (weight, [(a + 2 * k) * d, hidden])
        tensors[f"{layer}.attention.qkv.bias"] = ("BF16", [(a + 2 * k) * d])
        tensors[f"{layer}.attention.dense.weight"] = (weight, [hidden, a * d])
        tensors[f"{layer}.mlp.fc.weight"] = (weight, [intermediate // tp, hidden])
        tensors[f"{layer}.mlp.gate.weight"] = (weight, [intermediate // tp, hidden])
        tensors[f"{layer}.mlp.proj.weight"] = (weight, [hidden, intermediate // tp])
        if fp8:
            for linear in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
                tensors[f"{layer}.{linear}.weights_scaling_factor"] = ("F32", [1])
                tensors[f"{layer}.{linear}.activation_scaling_factor"] = ("F32", [1])
        if kv_fp8:
            tensors[f"{layer}.attention.kv_cache_scaling_factor"] = ("F32", [1])
    if stage == stages - 1:
        tensors["transformer.ln_f.weight"] = ("BF16", [hidden])
        head = "F8_E4M3" if fp8_head else "BF16"
        tensors["lm_head.weight"] = (head, [math.ceil(vocabulary / tp), hidden])
        if fp8_head:
            tensors["lm_head.weights_scaling_factor"] = ("F32", [1])
            tensors["lm_head.activation_scaling_factor"] = ("F32", [1])
    return tensors


def has_fp8_head(quantization: dict[str, Any]) -> bool:
    """Whether `quantize_layers` of quantization/quantize.py makes lm_head an FP8Linear.

    A list takes the place of the default. 1.2.1 asks for None, older versions for an empty list
    too: so a list that is meant must hold something.
    """
    excluded = quantization.get("exclude_modules")
    assert excluded != [], "versions differ on an empty list"
    patterns = ["*lm_head"] if excluded is None else excluded  # of the default what matters here
    is_excluded = any(fnmatchcase("lm_head", pattern) for pattern in patterns)
    return quantization["quant_algo"] == "FP8" and not is_excluded


def stored_tensors(path: Path) -> Expected:
    """The same of a file on disk, from its header's bytes alone."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
