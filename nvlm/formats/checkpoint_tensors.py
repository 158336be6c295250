"""The tensors a checkpoint directory holds, by name, type and shape.

The converter allocates its files from these lists and the loaders check against them. Decoder:
TensorRT-LLM 1.2.1's QWenForCausalLM. Vision: the published names in one dtype.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.safetensors_reader import SafetensorsReader, TensorInfo
from nvlm.formats.tensor_names import (
    ENGINE_LAYER,
    HEAD,
    KV_CACHE_SCALE,
    VISION_LAYER,
)
from nvlm.model.config import VisionConfig, exact_div
from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import NumberFormat
from nvlm.model.vision import VISION_FORMAT, VISION_LINEARS, VisionModel
from nvlm.program.errors import UserError


def decoder_layer_tensors(config: CheckpointConfig, layer: int = 0) -> dict[str, TensorInfo]:
    """One layer's tensors on any rank, under names relative to `transformer.layers.{i}.`.

    layer: in the model; layers differ only where linears are excluded from quantisation.
    """
    decoder, dtype = config.decoder, TORCH_DTYPES[config.dtype]
    mapping = config.mapping()
    query_size = mapping.local_heads(decoder.num_attention_heads) * decoder.head_dim
    key_value_size = mapping.local_heads(decoder.num_key_value_heads) * decoder.head_dim
    qkv_size = query_size + 2 * key_value_size
    hidden = decoder.hidden_size
    intermediate = exact_div(decoder.intermediate_size, config.tp_size)
    linear_shapes = {
        "attention.qkv": (qkv_size, hidden),
        "attention.dense": (hidden, query_size),
        "mlp.fc": (intermediate, hidden),
        "mlp.gate": (intermediate, hidden),
        "mlp.proj": (hidden, intermediate),
    }
    tensors = {"input_layernorm.weight": TensorInfo(dtype, (hidden,))}
    for name in DECODER_LINEARS:
        weight_format = config.linear_format(layer, name)
        stored_dtype = weight_format.stored_dtype(dtype)
        tensors[f"{name}.weight"] = TensorInfo(stored_dtype, linear_shapes[name])
        if name == "attention.qkv":
            tensors["attention.qkv.bias"] = TensorInfo(dtype, (qkv_size,))
        tensors |= _scale_tensors(name, weight_format)
    if config.stored_kv_format.scale_shapes:
        tensors[KV_CACHE_SCALE] = TensorInfo(torch.float32, (1,))
    tensors["post_layernorm.weight"] = TensorInfo(dtype, (hidden,))
    return tensors


def decoder_tensors(config: CheckpointConfig, rank: int = 0) -> dict[str, TensorInfo]:
    """All tensors of a rank's file, in the order they are written; layers count from 0.

    The embedding is whole on every rank of the first stage (use_parallel_embedding is false); the
    head's rows are split over the last one.
    """
    decoder, dtype, mapping = config.decoder, TORCH_DTYPES[config.dtype], config.mapping(rank)
    vocab_size, hidden = decoder.vocab_size, decoder.hidden_size
    tensors = {}
    if mapping.is_first_stage:
        tensors["transformer.vocab_embedding.weight"] = TensorInfo(dtype, (vocab_size, hidden))
    for i, number in enumerate(mapping.layers(decoder.num_hidden_layers)):
        prefix, layer = ENGINE_LAYER.format(i=i), decoder_layer_tensors(config, number)
        tensors |= {prefix + name: info for name, info in layer.items()}
    if mapping.is_last_stage:
        tensors["transformer.ln_f.weight"] = TensorInfo(dtype, (hidden,))
        rows = exact_div(mapping.padded_vocab_size(vocab_size), config.tp_size)
        stored_dtype = config.head_format.stored_dtype(dtype)
        tensors[f"{HEAD}.weight"] = TensorInfo(stored_dtype, (rows, hidden))
        tensors |= _scale_tensors(HEAD, config.head_format)
    return tensors


def vision_tensors(config: VisionConfig, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """All tensors of `vision/model.safetensors`: exactly the module's state dict."""
    with torch.device("meta"):
        state = VisionModel(config).state_dict()
    return {name: TensorInfo(dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def vision_linears(config: VisionConfig) -> list[str]:
    """The linears that may be quantised, by full name."""
    layers = (VISION_LAYER.format(i=i) for i in range(config.num_hidden_layers))
    return [layer + linear for layer in layers for linear in VISION_LINEARS]


def vision_scales(config: VisionConfig) -> dict[str, TensorInfo]:
    """All tensors of `vision/scales.safetensors`."""
    tensors: dict[str, TensorInfo] = {}
    for linear in vision_linears(config):
        tensors |= _scale_tensors(linear, VISION_FORMAT)
    return tensors


def _scale_tensors(linear: str, number_format: NumberFormat) -> dict[str, TensorInfo]:
    return {
        f"{linear}.{kind}": TensorInfo(torch.float32, shape)
        for kind, shape in number_format.scale_shapes.items()
    }


def open_checked(path: Path, expected: dict[str, TensorInfo]) -> SafetensorsReader:
    """Opens a file that must hold exactly `expected`."""
    reader = SafetensorsReader(path)
    for name in [*expected, *reader.tensors]:
        found, wanted = reader.tensors.get(name), expected.get(name)
        if found != wanted:
            raise UserError(
                f"{path}: {name} is {_text(found)}, config.json asks for {_text(wanted)}"
            )
    return reader


def _text(info: TensorInfo | None) -> str:
    return "absent" if info is None else f"{info.dtype} {list(info.shape)}"
