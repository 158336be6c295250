"""Writes a Hugging Face NVLM-D checkpoint the way Megatron-Core saves it, for any TP and PP.

Row orders are index lists made head by head, as NVIDIA's own converters make them (Megatron-LM's
examples/multimodal/model_converter and tools/checkpoint). Beside the weights a rank's file holds
what training leaves there: arguments, optimizer, state of random number generators, `_extra_state`,
and objects of Megatron's and Transformer Engine's classes.
"""

from __future__ import annotations

import enum
import io
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.reference.safetensors_numpy import read_config
from tests.support.modules import importable

VISION_HEAD_DIM = 128
Tensors = dict[str, torch.Tensor]
Edit = Callable[[int, int, dict[str, Any]], None]
"""Changes what one rank's file holds; called with tp, pp and the content."""


@dataclass(frozen=True)
class Layout:
    """`layers_per_stage`: None for an even split. `vocab_rows`: None for Megatron's padding.

    `embedding_stage` is 1 where the vision model has the first stage for itself
    (--encoder-pipeline-model-parallel-size 1).
    """

    tp_size: int = 1
    pp_size: int = 1
    iteration: int | str = 1
    layers_per_stage: tuple[int, ...] | None = None
    vocab_rows: int | None = None
    embedding_stage: int = 0
    extra_args: dict[str, Any] = field(default_factory=dict)


def write_megatron(
    model_dir: Path, output_dir: Path, layout: Layout, edit: Edit | None = None
) -> Path:
    """Returns the iteration's folder. Weights are bfloat16; no tokenizer is written."""
    config = read_config(model_dir)
    weights: Tensors = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        weights |= {name: t.to(torch.bfloat16) for name, t in load_file(path).items()}
    if layout.iteration == "release":
        iteration_dir = output_dir / "release"
    else:
        iteration_dir = output_dir / f"iter_{layout.iteration:07d}"
    for tp in range(layout.tp_size):
        for pp in range(layout.pp_size):
            name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if layout.pp_size > 1 else "")
            content = rank_content(rank_tensors(weights, config, layout, tp, pp), config, layout)
            vars(content["args"]).setdefault("rank", pp * layout.tp_size + tp)
            if edit is not None:
                edit(tp, pp, content)
            save_rank(iteration_dir / name / "model_optim_rng.pt", content)
    (output_dir / "latest_checkpointed_iteration.txt").write_text(f"{layout.iteration}")
    return iteration_dir


# Row orders: element i is the published row that stands at Megatron's row i.


def decoder_qkv_order(num_heads: int, num_groups: int, head_dim: int) -> list[int]:
    """Published rows counted through q, then k, then v."""
    k_start = num_heads * head_dim
    v_start = k_start + num_groups * head_dim
    order = []
    for group in range(num_groups):
        for head in range(num_heads):
            if head // (num_heads // num_groups) == group:
                order += [head * head_dim + c for c in range(head_dim)]
        order += [k_start + group * head_dim + c for c in range(head_dim)]
        order += [v_start + group * head_dim + c for c in range(head_dim)]
    return order


def vision_qkv_order(heads: list[int], num_stored_heads: int, head_dim: int) -> list[int]:
    """Published rows are q of all stored heads, then k, then v."""
    order = []
    for head in heads:
        for part in range(3):
            start = (part * num_stored_heads + head) * head_dim
            order += range(start, start + head_dim)
    return order


def rank_tensors(
    weights: Tensors, config: dict[str, Any], layout: Layout, tp: int, pp: int
) -> dict[str, Any]:
    """The `model` of one rank, `_extra_state` entries included."""
    llm, size = config["llm_config"], layout.tp_size
    per_stage = layout.layers_per_stage or (
        (llm["num_hidden_layers"] // layout.pp_size,) * layout.pp_size
    )
    model: dict[str, Any] = OrderedDict()
    if pp == 0:
        model |= _vision(weights, config, size, tp)
    if pp == layout.embedding_stage:
        rows = _padded(weights["language_model.model.embed_tokens.weight"], layout)
        model["language_model.embedding.word_embeddings.weight"] = _part(rows, 0, size, tp)
    for local in range(per_stage[pp]):
        layer = _decoder_layer(weights, llm, sum(per_stage[:pp]) + local, size, tp)
        model |= {f"language_model.decoder.layers.{local}.{k}": v for k, v in layer.items()}
    if pp == layout.pp_size - 1:
        model["language_model.decoder.final_layernorm.weight"] = weights[
            "language_model.model.norm.weight"
        ]
        rows = _padded(weights["language_model.lm_head.weight"], layout)
        model["language_model.output_layer.weight"] = _part(rows, 0, size, tp)
        model["language_model.output_layer._extra_state"] = None
    return model


def _part(tensor: torch.Tensor, axis: int, size: int, rank: int) -> torch.Tensor:
    length = tensor.shape[axis] // size
    assert length * size == tensor.shape[axis]
    return tensor.narrow(axis, rank * length, length).clone()


def _padded(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    multiple = 128 * layout.tp_size
    rows = layout.vocab_rows or -(-len(tensor) // multiple) * multiple
    return torch.cat([tensor, *[tensor[-1:]] * max(0, rows - len(tensor))])[:rows]


def _vision(weights: Tensors, config: dict[str, Any], size: int, tp: int) -> dict[str, Any]:
    vision = config["vision_config"]
    real = vision["num_attention_heads"]
    heads = list(range(real))
    while len(heads) % size:
        heads.append(len(heads))  # the published dummy heads, zeros like Megatron's
    stored = len(weights["vision_model.encoder.layers.0.attn.q_norm.weight"]) // VISION_HEAD_DIM
    of_heads = [head * VISION_HEAD_DIM + c for head in heads for c in range(VISION_HEAD_DIM)]
    embeddings, result = "vision_model.embeddings.", {}
    for theirs, ours in (
        ("class_token", "class_embedding"),
        ("conv1.weight", "patch_embedding.weight"),
        ("conv1.bias", "patch_embedding.bias"),
        ("position_embeddings.weight", "position_embedding"),
    ):
        result[f"vision_model.{theirs}"] = weights[embeddings + ours]
    positions = "vision_model.position_embeddings.weight"
    result[positions] = result[positions].squeeze(0)
    for i in range(vision["num_hidden_layers"]):
        w = {
            name.removeprefix(f"vision_model.encoder.layers.{i}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"vision_model.encoder.layers.{i}.")
        }
        qkv = w["attn.qkv.weight"][vision_qkv_order(heads, stored, VISION_HEAD_DIM)]
        layer = {
            "input_layernorm.weight": w["norm1.weight"],
            "pre_mlp_layernorm.weight": w["norm2.weight"],
            "ls1": w["ls1"],
            "ls2": w["ls2"],
            "self_attention.linear_qkv.weight": _part(qkv, 0, size, tp),
            "self_attention.linear_qkv._extra_state": io.BytesIO(b"scales"),
            "self_attention.q_layernorm.weight": _part(
                w["attn.q_norm.weight"][of_heads], 0, size, tp
            ),
            "self_attention.k_layernorm.weight": _part(
                w["attn.k_norm.weight"][of_heads], 0, size, tp
            ),
            "self_attention.linear_proj.weight": _part(
                w["attn.proj.weight"][:, of_heads], 1, size, tp
            ),
            "self_attention.linear_proj.bias": w["attn.proj.bias"],
            "mlp.linear_fc1.weight": _part(w["mlp.fc1.weight"], 0, size, tp),
            "mlp.linear_fc1.bias": _part(w["mlp.fc1.bias"], 0, size, tp),
            "mlp.linear_fc2.weight": _part(w["mlp.fc2.weight"], 1, size, tp),
            "mlp.linear_fc2.bias": w["mlp.fc2.bias"],
            "mlp.linear_fc2._extra_state": torch.zeros(3, dtype=torch.uint8),
        }
        result |= {f"vision_model.decoder.layers.{i}.{name}": t for name, t in layer.items()}
    result |= {
        "vision_projection.encoder.linear_fc1.layer_norm_weight": weights["mlp1.0.weight"],
        "vision_projection.encoder.linear_fc1.layer_norm_bias": weights["mlp1.0.bias"],
        "vision_projection.encoder.linear_fc1.weight": _part(weights["mlp1.1.weight"], 0, size, tp),
        "vision_projection.encoder.linear_fc2.weight": _part(weights["mlp1.3.weight"], 1, size, tp),
    }
    return result


def _decoder_layer(
    weights: Tensors, llm: dict[str, Any], i: int, size: int, tp: int
) -> dict[str, Any]:
    prefix = f"language_model.model.layers.{i}."
    w = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    heads, groups = llm["num_attention_heads"], llm["num_key_value_heads"]
    order = decoder_qkv_order(heads, groups, llm["hidden_size"] // heads)
    fused = {
        kind: torch.cat([w[f"self_attn.{part}_proj.{kind}"] for part in "qkv"])[order]
        for kind in ("weight", "bias")
    }
    gate, up = (_part(w[f"mlp.{part}_proj.weight"], 0, size, tp) for part in ("gate", "up"))
    return {
        "self_attention.linear_qkv.layer_norm_weight": w["input_layernorm.weight"],
        "self_attention.linear_qkv.weight": _part(fused["weight"], 0, size, tp),
        "self_attention.linear_qkv.bias": _part(fused["bias"], 0, size, tp),
        "self_attention.linear_qkv._extra_state": FP8State(),
        "self_attention.linear_proj.weight": _part(w["self_attn.o_proj.weight"], 1, size, tp),
        "mlp.linear_fc1.layer_norm_weight": w["post_attention_layernorm.weight"],
        "mlp.linear_fc1.weight": torch.cat([gate, up]),
        "mlp.linear_fc1._extra_state": None,
        "mlp.linear_fc2.weight": _part(w["mlp.down_proj.weight"], 1, size, tp),
    }


# What else is in the file.


class ModelType(enum.Enum):
    """Pickled as megatron.core.enums.ModelType."""

    encoder_or_decoder = 1


class FP8State:
    """Pickled as transformer_engine.pytorch.FP8State."""

    def __init__(self) -> None:
        self.scale = [1.0]


ModelType.__module__ = "megatron.core.enums"
FP8State.__module__ = "transformer_engine.pytorch"
_CLASSES = (ModelType, FP8State)


@contextmanager
def _importable_classes() -> Iterator[None]:
    """pickle wants to find a class where it says that it lives."""
    modules: dict[str, types.ModuleType] = {}
    for cls in _CLASSES:
        path = cls.__module__.split(".")
        for end in range(1, len(path) + 1):
            name = ".".join(path[:end])
            modules.setdefault(name, types.ModuleType(name))
        setattr(modules[cls.__module__], cls.__name__, cls)
    with importable(modules):
        yield


def arguments(config: dict[str, Any], layout: Layout) -> Namespace:
    """As training on the command line of examples/multimodal/nvlm leaves them, in part."""
    llm, vision = config["llm_config"], config["vision_config"]
    values = {
        "num_layers": llm["num_hidden_layers"],
        "hidden_size": llm["hidden_size"],
        "ffn_hidden_size": llm["intermediate_size"],
        "num_attention_heads": llm["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": llm["num_key_value_heads"],
        "kv_channels": llm["hidden_size"] // llm["num_attention_heads"],
        "normalization": "RMSNorm",
        "norm_epsilon": llm["rms_norm_eps"],
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": True,
        "position_embedding_type": "rope",
        "rotary_base": int(llm["rope_theta"]),
        "rotary_percent": 1.0,
        "max_position_embeddings": 8192,
        "padded_vocab_size": layout.vocab_rows or llm["vocab_size"],
        "tensor_model_parallel_size": layout.tp_size,
        "pipeline_model_parallel_size": layout.pp_size,
        "params_dtype": torch.bfloat16,
        "vision_model_type": "internvit",
        "language_model_type": "qwen2.0_72B",
        "img_h": vision["image_size"],
        "model_type": ModelType.encoder_or_decoder,
        "data_path": ["a", "b"],
        **layout.extra_args,
    }
    return Namespace(**{key: value for key, value in values.items() if value is not ...})


def rank_content(model: dict[str, Any], config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    return {
        "args": arguments(config, layout),
        "checkpoint_version": 3.0,
        "iteration": layout.iteration if isinstance(layout.iteration, int) else 0,
        "model": model,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(7)}}, "type": FP8State()},
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": 2**40},
        "rng_state": [
            {
                "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "random_rng_state": (3, (2**31, 2**32 - 1), None),
            }
        ],
    }


def save_rank(path: Path, content: dict[str, Any], **options: Any) -> None:
    """`options` are torch.save's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _importable_classes():
        torch.save(content, path, **options)
