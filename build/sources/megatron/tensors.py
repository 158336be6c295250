"""Table of Megatron-Core's tensors (Transformer Engine layer specs) and what each of them holds.

One row per kind of tensor: its name, the shape of all ranks together in the symbols of
`dimensions`, the axis that tensor parallelism splits, and the published tensors in it with how they
are put together. Layers count from 0 on each pipeline stage. Source: examples/multimodal of
NVIDIA/Megatron-LM (branch NVLM-1.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from build.sources.megatron import merge
from build.sources.megatron.merge import Merge
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    EMBED_TOKENS,
    FINAL_NORM,
    LM_HEAD,
    PROJECTOR_PREFIX,
    VISION_LAYER,
    dimensions,
)
from nvlm.model.config import NVLMConfig

WORD_EMBEDDINGS = "language_model.embedding.word_embeddings.weight"
PATCH_EMBEDDING = "vision_model.conv1.weight"
POSITION_EMBEDDINGS = "vision_model.position_embeddings.weight"
MEGATRON_VISION_LAYER = "vision_model.decoder.layers.{i}."
MEGATRON_DECODER_LAYER = "language_model.decoder.layers.{i}."

_Row = tuple[str, str, int | None, dict[str, Merge]]

# Symbols as in nvlm/formats/tensor_names.py (A and V as Megatron pads them), 2F: gate and up,
# G: q, k and v of all query groups.
_VISION_TOP: tuple[_Row, ...] = (
    ("class_token", "1 1 H", None, {"class_embedding": merge.replicated}),
    ("conv1.weight", "H 3 P P", None, {"patch_embedding.weight": merge.replicated}),
    ("conv1.bias", "H", None, {"patch_embedding.bias": merge.replicated}),
    ("position_embeddings.weight", "N H", None, {"position_embedding": merge.positions}),
)
_PROJECTOR: tuple[_Row, ...] = (
    ("linear_fc1.layer_norm_weight", "J", None, {"0.weight": merge.replicated}),
    ("linear_fc1.layer_norm_bias", "J", None, {"0.bias": merge.replicated}),
    ("linear_fc1.weight", "W J", 0, {"1.weight": merge.rows}),
    ("linear_fc2.weight", "D W", 1, {"3.weight": merge.columns}),
)
_DECODER_TOP: tuple[_Row, ...] = (
    ("embedding.word_embeddings.weight", "V D", 0, {EMBED_TOKENS: merge.vocabulary}),
    ("decoder.final_layernorm.weight", "D", None, {FINAL_NORM: merge.replicated}),
    ("output_layer.weight", "V D", 0, {LM_HEAD: merge.vocabulary}),
)
_VISION_LAYER: tuple[_Row, ...] = (
    ("input_layernorm.weight", "H", None, {"norm1.weight": merge.replicated}),
    ("pre_mlp_layernorm.weight", "H", None, {"norm2.weight": merge.replicated}),
    ("ls1", "H", None, {"ls1": merge.replicated}),
    ("ls2", "H", None, {"ls2": merge.replicated}),
    ("self_attention.linear_qkv.weight", "3A H", 0, {"attn.qkv.weight": merge.vision_qkv}),
    ("self_attention.q_layernorm.weight", "A", 0, {"attn.q_norm.weight": merge.vision_rows}),
    ("self_attention.k_layernorm.weight", "A", 0, {"attn.k_norm.weight": merge.vision_rows}),
    ("self_attention.linear_proj.weight", "H A", 1, {"attn.proj.weight": merge.vision_columns}),
    ("self_attention.linear_proj.bias", "H", None, {"attn.proj.bias": merge.replicated}),
    ("mlp.linear_fc1.weight", "I H", 0, {"mlp.fc1.weight": merge.rows}),
    ("mlp.linear_fc1.bias", "I", 0, {"mlp.fc1.bias": merge.rows}),
    ("mlp.linear_fc2.weight", "H I", 1, {"mlp.fc2.weight": merge.columns}),
    ("mlp.linear_fc2.bias", "H", None, {"mlp.fc2.bias": merge.replicated}),
)
_DECODER_LAYER: tuple[_Row, ...] = (
    (
        "self_attention.linear_qkv.layer_norm_weight",
        "D",
        None,
        {"input_layernorm.weight": merge.replicated},
    ),
    (
        "self_attention.linear_qkv.weight",
        "G D",
        0,
        {
            "self_attn.q_proj.weight": merge.q,
            "self_attn.k_proj.weight": merge.k,
            "self_attn.v_proj.weight": merge.v,
        },
    ),
    (
        "self_attention.linear_qkv.bias",
        "G",
        0,
        {
            "self_attn.q_proj.bias": merge.q,
            "self_attn.k_proj.bias": merge.k,
            "self_attn.v_proj.bias": merge.v,
        },
    ),
    ("self_attention.linear_proj.weight", "D Q", 1, {"self_attn.o_proj.weight": merge.columns}),
    (
        "mlp.linear_fc1.layer_norm_weight",
        "D",
        None,
        {"post_attention_layernorm.weight": merge.replicated},
    ),
    (
        "mlp.linear_fc1.weight",
        "2F D",
        0,
        {"mlp.gate_proj.weight": merge.gate, "mlp.up_proj.weight": merge.up},
    ),
    ("mlp.linear_fc2.weight", "D F", 1, {"mlp.down_proj.weight": merge.columns}),
)


@dataclass(frozen=True, slots=True)
class MegatronTensor:
    """A tensor of a Megatron checkpoint and the published ones in it."""

    name: str  # in the rank's file
    shape: tuple[int, ...]  # on one rank
    holds: dict[str, Merge]  # published name -> how the ranks' shards make it
    stage: int | None = None  # the pipeline stage of a decoder layer; None: whichever has it


def megatron_tensors(
    stored: NVLMConfig, tp_size: int, layers_per_stage: list[int]
) -> Iterator[MegatronTensor]:
    """Every tensor of a checkpoint. `stored` counts heads and vocabulary as Megatron pads them.

    Query groups, heads, the MLPs and the vocabulary must divide by `tp_size`.
    """
    dims = dimensions(stored)
    dims |= {"2F": 2 * dims["F"], "G": dims["Q"] + 2 * dims["K"]}

    def tensors(
        table: tuple[_Row, ...], prefix: str = "", published: str = "", stage: int | None = None
    ) -> Iterator[MegatronTensor]:
        for name, symbols, axis, holds in table:
            shape = [dims[symbol] for symbol in symbols.split()]
            if axis is not None:
                assert shape[axis] % tp_size == 0, f"{name} {shape} is not for {tp_size} ranks"
                shape[axis] //= tp_size
            names = {published + part: how for part, how in holds.items()}
            yield MegatronTensor(prefix + name, tuple(shape), names, stage)

    yield from tensors(_VISION_TOP, "vision_model.", "vision_model.embeddings.")
    yield from tensors(_PROJECTOR, "vision_projection.encoder.", PROJECTOR_PREFIX)
    yield from tensors(_DECODER_TOP, "language_model.")
    for i in range(stored.vision.num_hidden_layers):
        yield from tensors(
            _VISION_LAYER, MEGATRON_VISION_LAYER.format(i=i), VISION_LAYER.format(i=i)
        )
    first = 0
    for stage, num_layers in enumerate(layers_per_stage):
        for i in range(num_layers):
            yield from tensors(
                _DECODER_LAYER,
                MEGATRON_DECODER_LAYER.format(i=i),
                DECODER_LAYER.format(i=first + i),
                stage,
            )
        first += num_layers
