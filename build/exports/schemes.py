"""How each export format says what is quantised, and what it calls the scales: one row a format.

ModelOpt 0.47's unified Hugging Face export, and compressed-tensors 0.20's float-quantized. vLLM
reads both, transformers the second; SGLang and TensorRT-LLM read ModelOpt's decoder alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvlm import __version__

_PRODUCER = {"name": "nvlm-engine", "version": __version__}


@dataclass(frozen=True, slots=True)
class Quantised:
    """What an export's configuration says of its number formats."""

    has_kv_cache: bool  # whether keys and values have scales
    # Modules of what stays in `dtype`, by name. One that ends in a dot stands for all that it
    # begins.
    ignored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A format of FP8 folders: a row a reader."""

    name: str  # value of --output_format
    key_scale: str  # after the layer's `self_attn.`
    value_scale: str  # after the layer's `self_attn.`
    scale_shape: tuple[int, ...]  # of every scale
    holds_vision: bool  # whether its readers take quantised linears of the ViT
    config: Callable[[Quantised], dict[str, Any]]  # `quantization_config` of config.json
    files: Callable[[Quantised], dict[str, dict[str, Any]]]  # further JSON files, by name
    weight_scale: str = "weight_scale"  # after a linear's name
    input_scale: str = "input_scale"  # after a linear's name
    query_scale: str = "q_scale"  # after the layer's `self_attn.`


def _modelopt_patterns(quantised: Quantised) -> list[str]:
    """Wildcards, as fnmatch reads them."""
    return [f"{name[:-1]}*" if name.endswith(".") else name for name in quantised.ignored]


def _modelopt_config(quantised: Quantised) -> dict[str, Any]:
    numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
    config: dict[str, Any] = {
        "config_groups": {"group_0": group},
        "ignore": _modelopt_patterns(quantised),
        "quant_algo": "FP8",
        "producer": _PRODUCER,
        "quant_method": "modelopt",
    }
    if quantised.has_kv_cache:
        config["kv_cache_scheme"] = numbers
    return config


def _modelopt_files(quantised: Quantised) -> dict[str, dict[str, Any]]:
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8" if quantised.has_kv_cache else None,
        "exclude_modules": _modelopt_patterns(quantised),
    }
    return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": quantization}}


def _compressed_tensors_config(quantised: Quantised) -> dict[str, Any]:
    numbers = {
        "num_bits": 8,
        "type": "float",
        "strategy": "tensor",
        "symmetric": True,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": numbers, "input_activations": numbers}
    # A pattern is matched from the name's beginning.
    ignore = [
        "re:" + name.replace(".", r"\.") + ".*" if name.endswith(".") else name
        for name in quantised.ignored
    ]
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "kv_cache_scheme": numbers if quantised.has_kv_cache else None,
        "ignore": ignore,
    }


MODELOPT = Scheme(
    name="modelopt",
    key_scale="k_proj.k_scale",
    value_scale="v_proj.v_scale",
    scale_shape=(),
    holds_vision=False,
    config=_modelopt_config,
    files=_modelopt_files,
)
COMPRESSED_TENSORS = Scheme(
    name="compressed-tensors",
    key_scale="k_scale",
    value_scale="v_scale",
    scale_shape=(1,),
    holds_vision=True,
    config=_compressed_tensors_config,
    files=lambda _: {},
)
SCHEMES = {scheme.name: scheme for scheme in (MODELOPT, COMPRESSED_TENSORS)}
"""By the name that --output_format gives."""
