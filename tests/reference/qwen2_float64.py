"""Second oracle of the decoder: Qwen2 in float64 numpy over whole sequences, optionally with FP8.

In: float64 weights under Hugging Face names and inputs_embeds. Out: logits of every position. No KV
cache, no batch, no rounding other than the FP8 that the scales ask for. Source: Qwen2's report
(arXiv 2407.10671; bias on q, k, v only, plain RoPE), llm_config in config.json of
nvidia/NVLM-D-72B (untied head), and the rows on FP8 of the numerics contract.
RoPE is written as a complex rotation of the pairs (i, i + head_dim / 2).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import fp8_e4m3
from .safetensors_numpy import Weights, read_config, read_weights

LINEARS = ("qkv", "dense", "fc_gate", "proj")  # q|k|v, o_proj, gate|up, down_proj


@dataclass(frozen=True, slots=True)
class LinearScales:
    """Real value = stored e4m3 value times scale."""

    weight: float
    activation: float


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """What an FP8 checkpoint says. linears[layer][name of LINEARS]; kv_cache[layer]: the
    scales of K and of V.

    An empty `linears` leaves the linears in float64, an empty `kv_cache` the K and V.
    """

    linears: tuple[dict[str, LinearScales], ...] = ()
    kv_cache: tuple[tuple[float, float], ...] = ()


def load(
    model_dir: Path, weight_dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], Weights]:
    """(llm_config, weights): `model.layers.0...`, `lm_head.weight`, without `language_model.`."""
    weights = read_weights(model_dir, "language_model.", weight_dtype)
    return read_config(model_dir)["llm_config"], weights


def embed(weights: Weights, token_ids: list[int]) -> np.ndarray:
    """[num_tokens, hidden]."""
    return weights["model.embed_tokens.weight"][token_ids]


def logits(
    config: dict[str, Any],
    weights: Weights,
    inputs_embeds: np.ndarray,
    scales: Fp8Scales | None = None,
    *,
    num_last: int = 0,
) -> np.ndarray:
    """Logits of every position [num_tokens, vocab] (of the `num_last` last ones), float64.

    inputs_embeds: [num_tokens, hidden]. Under `scales`, weights may be dequantised or raw:
    quantising a dequantised weight with its own scale changes nothing.
    """
    scales = scales or Fp8Scales()
    hidden = np.asarray(inputs_embeds, dtype=np.float64)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        linears = scales.linears[layer] if scales.linears else {}
        kv_scales = scales.kv_cache[layer] if scales.kv_cache else None
        hidden = hidden + _attention(config, own, hidden, linears, kv_scales)
        hidden = hidden + _mlp(config, own, hidden, linears)
    hidden = _rms_norm(hidden[-num_last:], weights["model.norm.weight"], config)
    return hidden @ weights["lm_head.weight"].T


def _attention(
    config: dict[str, Any],
    w: Weights,
    hidden: np.ndarray,
    linears: dict[str, LinearScales],
    kv_scales: tuple[float, float] | None,
) -> np.ndarray:
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, group = config["hidden_size"] // num_heads, num_heads // num_kv_heads
    normed = _rms_norm(hidden, w["input_layernorm.weight"], config)
    q, k, v = (
        (_linear(normed, w[f"self_attn.{n}_proj.weight"], linears.get("qkv")))
        + w[f"self_attn.{n}_proj.bias"]
        for n in "qkv"
    )
    num_tokens = len(hidden)
    q = _rotate(q.reshape(num_tokens, num_heads, head_dim), config["rope_theta"])
    k = _rotate(k.reshape(num_tokens, num_kv_heads, head_dim), config["rope_theta"])
    v = v.reshape(num_tokens, num_kv_heads, head_dim)
    if kv_scales is not None:  # what the cache holds, also for the tokens of this very step
        k, v = (
            fp8_e4m3.dequantize(fp8_e4m3.quantize(x, scale), scale)
            for x, scale in zip((k, v), kv_scales, strict=True)
        )
    future = np.triu(np.ones((num_tokens, num_tokens), dtype=bool), 1)
    mixed = np.empty((num_tokens, num_heads, head_dim))
    for head in range(num_heads):
        scores = q[:, head] @ k[:, head // group].T / math.sqrt(head_dim)
        scores[future] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, head] = weights @ v[:, head // group] / weights.sum(-1, keepdims=True)
    out = w["self_attn.o_proj.weight"]
    return _linear(mixed.reshape(num_tokens, -1), out, linears.get("dense"))


def _mlp(
    config: dict[str, Any], w: Weights, hidden: np.ndarray, linears: dict[str, LinearScales]
) -> np.ndarray:
    normed = _rms_norm(hidden, w["post_attention_layernorm.weight"], config)
    gate = _linear(normed, w["mlp.gate_proj.weight"], linears.get("fc_gate"))
    up = _linear(normed, w["mlp.up_proj.weight"], linears.get("fc_gate"))
    silu = gate * (1 + np.tanh(gate / 2)) / 2  # x * sigmoid(x)
    return _linear(silu * up, w["mlp.down_proj.weight"], linears.get("proj"))


def _linear(x: np.ndarray, weight: np.ndarray, scales: LinearScales | None) -> np.ndarray:
    """[num_tokens, in] x [out, in] -> [num_tokens, out], no bias; e4m3 codes times both scales."""
    if scales is None:
        return x @ weight.T
    x_codes = fp8_e4m3.TABLE[fp8_e4m3.quantize(x, scales.activation)]
    weight_codes = fp8_e4m3.TABLE[fp8_e4m3.quantize(weight, scales.weight)]
    product = x_codes @ weight_codes.T
    return product * float(np.float32(scales.activation)) * float(np.float32(scales.weight))


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """RoPE of [num_tokens, heads, head_dim] at positions 0, 1, 2, ..."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(len(x)), float(theta) ** (-np.arange(half) / half))
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _rms_norm(x: np.ndarray, weight: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weight
