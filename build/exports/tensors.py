"""The tensors of an export, by the name, type and shape that its readers ask for, and their files.

Names are the published ones: q, k and v stay apart, gate and up too. A linear's scales follow its
weight. With text alone the names begin after `language_model.`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from build.exports.schemes import Scheme
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import vision_linears
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    DECODER_PREFIX,
    ENGINE_FIRST_TENSORS,
    ENGINE_LAST_TENSORS,
    ENGINE_LAYER_TENSORS,
    HEAD,
    LM_HEAD,
    EngineTensor,
    model_tensors,
)
from nvlm.model.config import NVLMConfig
from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import FP8, UNQUANTIZED, NumberFormat

MAX_SHARD_BYTES = 5_000_000_000
"""What transformers writes into one file."""

BEFORE_CACHE_SCALES = "attention.qkv.bias"
"""The engine tensor after which a layer's scales of Q, K and V are written."""


@dataclass(frozen=True, slots=True)
class ExportTensors:
    """Names, shapes and types of an export's tensors."""

    model: NVLMConfig  # shape with the dummy heads: readers of NVLM-D want them stored
    config: CheckpointConfig  # of the decoder
    scheme: Scheme  # names of scales
    vision_format: NumberFormat  # of the ViT's linears
    has_vision: bool  # whether vision and projector are in it

    def name(self, published: str) -> str:
        """What the export calls a published tensor, or what begins as one."""
        return published if self.has_vision else published.removeprefix(DECODER_PREFIX)

    def scales(self, linear: str) -> tuple[str, str]:
        """Names of the scales of a linear's weight and of its input."""
        return f"{linear}.{self.scheme.weight_scale}", f"{linear}.{self.scheme.input_scale}"

    def cache_scales(self, layer: int) -> tuple[str, str, str]:
        """Names of the scales of Q, K and V."""
        prefix = self.name(DECODER_LAYER.format(i=layer)) + "self_attn."
        scheme = self.scheme
        return (
            prefix + scheme.query_scale,
            prefix + scheme.key_scale,
            prefix + scheme.value_scale,
        )

    def of_vision(self, names: tuple[str, ...]) -> Iterator[str]:
        """What is stored of these tensors of the vision model."""
        quantised = set(vision_linears(self.model.vision))
        for name in names:
            yield name
            linear = name.removesuffix(".weight")
            if linear in quantised and self.vision_format is not UNQUANTIZED:
                yield from self.scales(linear)

    def of_decoder(self, tensors: tuple[EngineTensor, ...], layer: int | None) -> Iterator[str]:
        """What is stored of these engine tensors, in the order in which it is written."""
        prefix = "" if layer is None else DECODER_LAYER.format(i=layer)
        is_cache_quantised = self.config.kv_cache_format is not UNQUANTIZED
        for tensor in tensors:
            for source in tensor.sources:
                name = self.name(prefix + source)
                yield name
                if is_quantised(tensor, layer, self.config):
                    yield from self.scales(name.removesuffix(".weight"))
            if layer is not None and tensor.name == BEFORE_CACHE_SCALES and is_cache_quantised:
                yield from self.cache_scales(layer)

    def excluded(self) -> list[str]:
        """Linears of the decoder that stay in `dtype`, by the export's names; the head first."""
        is_head_quantised = self.config.head_format is not UNQUANTIZED
        head = [] if is_head_quantised else [self.name(LM_HEAD).removesuffix(".weight")]
        return head + [
            self.name(DECODER_LAYER.format(i=i)) + source.removesuffix(".weight")
            for i in range(self.config.decoder.num_hidden_layers)
            for tensor in ENGINE_LAYER_TENSORS
            for source in tensor.sources
            if tensor.name.removesuffix(".weight") in DECODER_LINEARS
            and not is_quantised(tensor, i, self.config)
        ]

    def all(self) -> dict[str, TensorInfo]:
        """In the order of the model."""
        dtype = TORCH_DTYPES[self.config.dtype]
        published = {self.name(tensor.name): tensor for tensor in model_tensors(self.model)}
        names: list[str] = []
        if self.has_vision:
            names += self.of_vision(
                tuple(name for name in published if not name.startswith(DECODER_PREFIX))
            )
        names += self.of_decoder(ENGINE_FIRST_TENSORS, None)
        for i in range(self.config.decoder.num_hidden_layers):
            names += self.of_decoder(ENGINE_LAYER_TENSORS, i)
        names += self.of_decoder(ENGINE_LAST_TENSORS, None)
        stored = set(names)
        infos = {}
        for name in names:
            if name not in published:
                infos[name] = TensorInfo(torch.float32, self.scheme.scale_shape)
                continue
            linear = name.removesuffix(".weight")
            has_scales = linear != name and self.scales(linear)[0] in stored
            kept = FP8.stored_dtype(dtype) if has_scales else dtype
            infos[name] = TensorInfo(kept, published[name].shape)
        return infos

    def files(self, max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
        """By file: one `model.safetensors`, or shards of up to `max_bytes` each."""
        shards: list[dict[str, TensorInfo]] = [{}]
        size = 0
        for name, info in self.all().items():
            if shards[-1] and size + info.num_bytes > max_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = info
            size += info.num_bytes
        if len(shards) == 1:
            return {layout.WEIGHTS: shards[0]}
        return {layout.shard(i, len(shards)): shard for i, shard in enumerate(shards, start=1)}


def is_quantised(tensor: EngineTensor, layer: int | None, config: CheckpointConfig) -> bool:
    """Whether an engine tensor is the weight of a linear that is stored quantised."""
    linear = tensor.name.removesuffix(".weight")
    if layer is None:
        return linear == HEAD and config.head_format is not UNQUANTIZED
    if linear == tensor.name or linear not in DECODER_LINEARS:
        return False
    return config.linear_format(layer, linear) is not UNQUANTIZED
