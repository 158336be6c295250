"""Tables of tensor names: the published checkpoint, and where each tensor goes.

One row per kind of tensor. Shapes are written in the symbols of `dimensions`; `{i}` is the layer.
Source: model.safetensors.index.json of nvidia/NVLM-D-72B (1,556 names) and TensorRT-LLM 1.2.1's
QWenForCausalLM. The tests check that the tables are a bijection on the full list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from nvlm.model.config import NVLMConfig

PROJECTOR_PREFIX = "mlp1."
DECODER_PREFIX = "language_model."
VISION_LAYER = "vision_model.encoder.layers.{i}."
DECODER_LAYER = "language_model.model.layers.{i}."
ENGINE_LAYER = "transformer.layers.{i}."

EMBED_TOKENS = "language_model.model.embed_tokens.weight"
FINAL_NORM = "language_model.model.norm.weight"
LM_HEAD = "language_model.lm_head.weight"

_F32, _BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as nvidia/NVLM-D-72B stores it."""

    name: str  # as model.safetensors.index.json has it
    shape: tuple[int, ...]  # dummy heads of the ViT included
    dtype: torch.dtype  # bfloat16 or float32


# (name, shape, published dtype). Vision: H hidden, A stored attention channels, I intermediate,
# P patch side, N positions. Projector: J = 4 H, W width. Decoder: D hidden, Q query channels,
# K key/value channels, F intermediate, V vocabulary.
_VISION_TOP = (
    ("vision_model.embeddings.class_embedding", "1 1 H", _BF16),
    ("vision_model.embeddings.patch_embedding.weight", "H 3 P P", _BF16),
    ("vision_model.embeddings.patch_embedding.bias", "H", _BF16),
    ("vision_model.embeddings.position_embedding", "1 N H", _BF16),
)
_VISION_LAYER_ROWS = (
    ("norm1.weight", "H", _BF16),
    ("norm2.weight", "H", _BF16),
    ("ls1", "H", _BF16),
    ("ls2", "H", _BF16),
    ("attn.qkv.weight", "3A H", _F32),
    ("attn.q_norm.weight", "A", _F32),
    ("attn.k_norm.weight", "A", _F32),
    ("attn.proj.weight", "H A", _F32),
    ("attn.proj.bias", "H", _BF16),
    ("mlp.fc1.weight", "I H", _BF16),
    ("mlp.fc1.bias", "I", _BF16),
    ("mlp.fc2.weight", "H I", _BF16),
    ("mlp.fc2.bias", "H", _BF16),
)
_PROJECTOR = (
    ("mlp1.0.weight", "J", _BF16),
    ("mlp1.0.bias", "J", _BF16),
    ("mlp1.1.weight", "W J", _BF16),
    ("mlp1.3.weight", "D W", _BF16),
)
_DECODER_TOP = (
    (EMBED_TOKENS, "V D", _BF16),
    (FINAL_NORM, "D", _BF16),
    (LM_HEAD, "V D", _BF16),
)
_DECODER_LAYER_ROWS = (
    ("input_layernorm.weight", "D", _BF16),
    ("post_attention_layernorm.weight", "D", _BF16),
    ("self_attn.q_proj.weight", "Q D", _F32),
    ("self_attn.q_proj.bias", "Q", _F32),
    ("self_attn.k_proj.weight", "K D", _F32),
    ("self_attn.k_proj.bias", "K", _F32),
    ("self_attn.v_proj.weight", "K D", _F32),
    ("self_attn.v_proj.bias", "K", _F32),
    ("self_attn.o_proj.weight", "D Q", _BF16),
    ("mlp.gate_proj.weight", "F D", _BF16),
    ("mlp.up_proj.weight", "F D", _BF16),
    ("mlp.down_proj.weight", "D F", _BF16),
)

Row = tuple[str, str, torch.dtype]


def dimensions(config: NVLMConfig) -> dict[str, int]:
    vision, decoder = config.vision, config.decoder
    key_value_size = decoder.num_key_value_heads * decoder.head_dim
    return {
        "1": 1,
        "3": 3,
        "H": vision.hidden_size,
        "A": vision.attention_size,
        "3A": 3 * vision.attention_size,
        "I": vision.intermediate_size,
        "P": vision.patch_size,
        "N": vision.num_positions,
        "J": vision.projector_input_size,
        "W": vision.projector_hidden_size,
        "D": decoder.hidden_size,
        "Q": decoder.num_attention_heads * decoder.head_dim,
        "K": key_value_size,
        "F": decoder.intermediate_size,
        "V": decoder.vocab_size,
    }


def model_tensors(config: NVLMConfig) -> list[StoredTensor]:
    """Every tensor of an NVLM-D checkpoint of this shape: 1,556 for the 72B model."""
    dims = dimensions(config)

    def rows(table: tuple[Row, ...], prefix: str = "") -> Iterator[StoredTensor]:
        for name, shape, dtype in table:
            yield StoredTensor(prefix + name, tuple(dims[d] for d in shape.split()), dtype)

    tensors = [*rows(_VISION_TOP)]
    for i in range(config.vision.num_hidden_layers):
        tensors += rows(_VISION_LAYER_ROWS, VISION_LAYER.format(i=i))
    tensors += rows(_PROJECTOR)
    tensors += rows(_DECODER_TOP)
    for i in range(config.decoder.num_hidden_layers):
        tensors += rows(_DECODER_LAYER_ROWS, DECODER_LAYER.format(i=i))
    return tensors


Split = Literal["column", "row"]
"""Over tensor-parallel ranks: "column" parallel splits outputs (dim 0), "row" inputs (dim 1)."""


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor of a TensorRT-LLM checkpoint and the published ones stacked into it on dim 0."""

    name: str  # after `transformer.layers.N.`, or whole
    sources: tuple[str, ...]  # published names, in the order of the stack
    # Ranks split each source, then stack their parts. None: every rank holds all of it.
    split: Split | None = None


QKV_SOURCES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
KEY_VALUE_SOURCES = QKV_SOURCES[1:]
"""Their rows are key and value heads, which ranks share where there are too few."""

ENGINE_LAYER_TENSORS = (
    EngineTensor("input_layernorm.weight", ("input_layernorm.weight",)),
    EngineTensor(
        "attention.qkv.weight", tuple(f"{source}.weight" for source in QKV_SOURCES), "column"
    ),
    EngineTensor("attention.qkv.bias", tuple(f"{source}.bias" for source in QKV_SOURCES), "column"),
    EngineTensor("attention.dense.weight", ("self_attn.o_proj.weight",), "row"),
    EngineTensor("mlp.fc.weight", ("mlp.gate_proj.weight",), "column"),
    EngineTensor("mlp.gate.weight", ("mlp.up_proj.weight",), "column"),
    EngineTensor("mlp.proj.weight", ("mlp.down_proj.weight",), "row"),
    EngineTensor("post_layernorm.weight", ("post_attention_layernorm.weight",)),
)

ENGINE_FIRST_TENSORS = (EngineTensor("transformer.vocab_embedding.weight", (EMBED_TOKENS,)),)
"""Tensors of the first pipeline stage alone."""

HEAD = "lm_head"
"""The linear after the layers, which a number format may quantise."""

ENGINE_LAST_TENSORS = (
    EngineTensor("transformer.ln_f.weight", (FINAL_NORM,)),
    EngineTensor(f"{HEAD}.weight", (LM_HEAD,), "column"),
)
"""Tensors of the last pipeline stage alone."""

ENGINE_TOP_TENSORS = ENGINE_FIRST_TENSORS + ENGINE_LAST_TENSORS

KV_CACHE_SCALE = "attention.kv_cache_scaling_factor"
