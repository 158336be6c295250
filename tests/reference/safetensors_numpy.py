"""Reads stored weights as float64 numpy from the bytes, without the safetensors library.

In: a `model_dir` in the Hugging Face layout (`model.safetensors.index.json` and its shards, or one
`model.safetensors`). Out: `{name: float64 array}` and the raw `config.json`. It knows no model.
Format: u64 little-endian header length, JSON header, then the data
(https://github.com/huggingface/safetensors).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

Weights = dict[str, np.ndarray]


def read_config(model_dir: Path) -> dict[str, Any]:
    """The whole `config.json`, exactly as stored."""
    return json.loads((model_dir / "config.json").read_text("utf-8"))


def read_weights(
    model_dir: Path, prefix: str = "", weight_dtype: torch.dtype | None = None
) -> Weights:
    """Every tensor whose name starts with `prefix` (cut off the key), upcast to float64.

    `weight_dtype` rounds each tensor to that dtype first (what loading the checkpoint does to its
    float32 tensors: some of nvidia/NVLM-D-72B are); None keeps the stored values.
    """
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = sorted({file for name, file in weight_map.items() if name.startswith(prefix)})
    else:
        shards = ["model.safetensors"]
    weights: Weights = {}
    for shard in shards:
        weights |= _read_shard(model_dir / shard, prefix, weight_dtype)
    assert weights, f"no tensor named {prefix}* in {model_dir}"
    return weights


def _read_shard(path: Path, prefix: str, weight_dtype: torch.dtype | None) -> Weights:
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    header_end = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:header_end].tobytes())
    weights = {}
    for name, entry in header.items():
        if name == "__metadata__" or not name.startswith(prefix):
            continue
        begin, end = (header_end + offset for offset in entry["data_offsets"])
        values = _float64(raw[begin:end].tobytes(), entry["dtype"])
        if weight_dtype is not None:
            values = torch.from_numpy(values).to(weight_dtype).double().numpy()
        weights[name.removeprefix(prefix)] = values.reshape(entry["shape"])
    return weights


def _float64(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(float)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(float)
