"""The model's configuration from a Megatron checkpoint, which has none in Hugging Face's form.

Megatron's arguments describe the language model; the ViT's sizes are constants of Megatron's code
(examples/multimodal/config.py), so they are read off the tensors. What belongs to a run and not to
the weights is as published.
"""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from build.sources.megatron.rank_file import RankFile
from nvlm.model.config import (
    NUM_DUMMY_HEADS,
    DecoderConfig,
    NVLMConfig,
    TilingConfig,
    VisionConfig,
    exact_div,
)
from nvlm.program.errors import UserError
from nvlm.program.json_files import StrictReader

Stages = list[list[RankFile]]
"""The files of each pipeline stage, in it those of each tensor-parallel rank."""

log = logging.getLogger(__name__)

VISION_HEAD_DIM = 128
"""InternViT-6B's. Without it no shape shows where the real heads end."""

_VISION_NORM_EPS = 1e-6  # layernorm_epsilon of Megatron's internvit config

# What nvidia/NVLM-D-72B publishes and Megatron takes from the command line of each run: args may
# hold the values of another run, or a converter's defaults.
_MAX_POSITION_EMBEDDINGS = 32768
_MAX_NUM_TILES = 6
_ROPE_THETA = 1e6
_NORM_EPS = 1e-6
_VOCABULARY_MULTIPLE = 512  # 152,064 embeddings for 151,665 tokens

# What alters the computation: (argument, value of NVLM-D[, what its absence means]).
_FIXED: tuple[tuple[Any, ...], ...] = (
    ("normalization", "RMSNorm"),
    ("swiglu", True),
    ("add_bias_linear", False),
    ("add_qkv_bias", True),
    ("untie_embeddings_and_output_weights", True),
    ("position_embedding_type", "rope"),
    ("rotary_percent", 1.0, 1.0),
    ("rotary_interleaved", False, False),
    ("rotary_seq_len_interpolation_factor", None, None),
    ("use_rope_scaling", False, False),
    ("apply_layernorm_1p", False, False),
    ("num_experts", None, None),
    ("vision_model_type", "internvit", "internvit"),
)

MODEL_ARGS = (
    *(row[0] for row in _FIXED),
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"),
    *("group_query_attention", "num_query_groups", "tensor_model_parallel_size"),
)
"""The arguments that are read here, on which all ranks must agree."""


@dataclass(frozen=True, slots=True)
class MegatronConfig:
    """A Megatron checkpoint's model, as it is and as it is stored."""

    published: NVLMConfig  # what the source delivers
    stored: NVLMConfig  # the same with Megatron's padding of the ViT's heads and of the vocabulary
    layers_per_stage: list[int]  # decoder layers of each pipeline stage, in order


def model_config(stages: Stages, num_tokens: int) -> MegatronConfig:
    """`num_tokens`: of the tokenizer. Raises `UserError` where args and tensors contradict."""
    first = stages[0][0]
    args = StrictReader(first.args, first.path, "args.")
    decoder = _decoder(args, len(stages[0]), num_tokens)
    vision = _vision(stages, decoder)
    tiling = TilingConfig(vision.image_size, _MAX_NUM_TILES)
    stored_vision = replace(vision, num_dummy_heads=_num_stored_dummy_heads(stages, vision))
    stored_decoder = replace(decoder, vocab_size=_num_stored_embeddings(stages, num_tokens))
    return MegatronConfig(
        NVLMConfig(vision, decoder, tiling),
        NVLMConfig(stored_vision, stored_decoder, tiling),
        _layers_per_stage(stages, decoder.num_hidden_layers),
    )


def _decoder(args: StrictReader, tp_size: int, num_tokens: int) -> DecoderConfig:
    for name, value, *absent in _FIXED:
        args.one_of(name, (value,), *absent)
    for name, value in (("rotary_base", _ROPE_THETA), ("norm_epsilon", _NORM_EPS)):
        if args.values.get(name, value) != value:
            log.warning("args.%s is %s; NVLM-D's %s is used", name, args.values[name], value)
    # Not compared: pipeline_model_parallel_size, which pp_checkpoint_converter.py leaves as it was.
    if args.positive_int("tensor_model_parallel_size") != tp_size:
        raise UserError(
            f"{args.path}: args.tensor_model_parallel_size is "
            f"{args.values['tensor_model_parallel_size']}, but the folders mp_rank_* are of "
            f"{tp_size} tensor-parallel ranks; copy all ranks under the names Megatron gave them"
        )
    has_groups = args.one_of("group_query_attention", (True, False))
    groups = "num_query_groups" if has_groups else "num_attention_heads"
    args.require_multiple("hidden_size", 2, "num_attention_heads")  # RoPE rotates pairs
    args.require_multiple("num_attention_heads", 1, groups)
    args.require_multiple(groups, 1, "tensor_model_parallel_size")
    args.require_multiple("ffn_hidden_size", 1, "tensor_model_parallel_size")
    config = DecoderConfig(
        hidden_size=args.positive_int("hidden_size"),
        intermediate_size=args.positive_int("ffn_hidden_size"),
        num_hidden_layers=args.positive_int("num_layers"),
        num_attention_heads=args.positive_int("num_attention_heads"),
        num_key_value_heads=args.positive_int(groups),
        vocab_size=-(-num_tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE,
        max_position_embeddings=_MAX_POSITION_EMBEDDINGS,
        rope_theta=_ROPE_THETA,
        rms_norm_eps=_NORM_EPS,
    )
    args.one_of("kv_channels", (config.head_dim, None), None)
    return config


def _vision(stages: Stages, decoder: DecoderConfig) -> VisionConfig:
    hidden_size, _, patch_size, _ = _shape(stages, "vision_model.conv1.weight", 4)
    num_positions, _ = _shape(stages, "vision_model.position_embeddings.weight", 2)
    fc1_rows, _ = _shape(stages, "vision_model.decoder.layers.0.mlp.linear_fc1.weight", 2)
    side = math.isqrt(max(num_positions - 1, 0))
    if side**2 + 1 != num_positions or side % 2 or hidden_size % VISION_HEAD_DIM:
        raise UserError(
            f"{stages[0][0].path}: the vision model has {num_positions} positions and "
            f"{hidden_size} channels, expected an even square and one, and heads of "
            f"{VISION_HEAD_DIM}, as InternViT-6B has; give an NVLM-D checkpoint"
        )
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=fc1_rows * len(stages[0]),
        num_hidden_layers=sum(_num_layers(stage[0], "vision_model") for stage in stages),
        num_attention_heads=exact_div(hidden_size, VISION_HEAD_DIM),
        num_dummy_heads=NUM_DUMMY_HEADS,
        image_size=side * patch_size,
        patch_size=patch_size,
        norm_eps=_VISION_NORM_EPS,
        projector_hidden_size=decoder.intermediate_size,
        output_size=decoder.hidden_size,
        projector_norm_eps=_NORM_EPS,  # Megatron has one for the whole model
    )


def _num_stored_dummy_heads(stages: Stages, vision: VisionConfig) -> int:
    """Megatron pads the heads to a multiple of its ranks: 25, 26, 28 or 32 for 1, 2, 4 or 8."""
    name = "vision_model.decoder.layers.0.self_attention.q_layernorm.weight"
    (channels,) = _shape(stages, name, 1)
    num_heads = channels // VISION_HEAD_DIM * len(stages[0])
    num_dummy_heads = num_heads - vision.num_attention_heads
    if channels % VISION_HEAD_DIM or not 0 <= num_dummy_heads <= NUM_DUMMY_HEADS:
        raise UserError(
            f"{stages[0][0].path}: {name} has {channels} channels on each of {len(stages[0])} "
            f"ranks, expected heads of {VISION_HEAD_DIM}, {vision.num_attention_heads} to "
            f"{vision.num_stored_heads} on all ranks; use files of one NVLM-D checkpoint"
        )
    return num_dummy_heads


def _num_stored_embeddings(stages: Stages, num_tokens: int) -> int:
    """Megatron pads the vocabulary to a multiple of 128 times its ranks."""
    name = "language_model.embedding.word_embeddings.weight"
    num_rows = _shape(stages, name, 2)[0] * len(stages[0])
    if num_rows < num_tokens:
        raise UserError(
            f"{stages[0][0].path}: {name} has {num_rows} rows on all ranks, but the tokenizer has "
            f"{num_tokens} tokens; give the checkpoint's own tokenizer as --tokenizer_dir"
        )
    return num_rows


def _layers_per_stage(stages: Stages, num_layers: int) -> list[int]:
    """Decoder layers of each pipeline stage, which need not be as many on each."""
    counts = [_num_layers(stage[0], "language_model") for stage in stages]
    if sum(counts) != num_layers:
        raise UserError(
            f"{stages[0][0].path}: args.num_layers is {num_layers}, but the {len(stages)} pipeline "
            f"ranks hold {sum(counts)} layers of the language model; copy all ranks"
        )
    return counts


def _num_layers(file: RankFile, model: str) -> int:
    pattern = re.compile(rf"{model}\.decoder\.layers\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, file.tensors) if match})


def _shape(stages: Stages, name: str, num_dimensions: int) -> tuple[int, ...]:
    """The shape on the first rank of the stage that has the tensor."""
    for stage in stages:
        tensor = stage[0].tensors.get(name)
        if tensor is not None and tensor.dim() == num_dimensions and tensor.numel():
            return tuple(tensor.shape)
    raise UserError(
        f"{stages[0][0].path.parent.parent} has no tensor {name} of {num_dimensions} dimensions, "
        "expected the whole NVLM-D model, saved with Transformer Engine layers; give that"
    )
