"""A rank's tensors as the plain form takes them, laid out for a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import (
    decoder_layer_tensors,
    decoder_tensors,
    open_checked,
)
from nvlm.formats.safetensors_reader import TensorSource
from nvlm.formats.tensor_names import ENGINE_LAYER, HEAD
from nvlm.model.decoder import DECODER_LINEARS, AllReduce, DecoderLayer
from nvlm.model.linear import QuantizableLinear
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.memory_plan import decoder_may_widen
from runtime.decoder.models.kv_scales import LayerScales, read_scales


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The decoder's weights as a rank holds them."""

    embedding: torch.Tensor  # [vocab_size, hidden_size], whole on every rank
    layers: list[DecoderLayer]  # in order
    final_norm: torch.Tensor  # [hidden_size]
    lm_head: QuantizableLinear  # the rank's rows of the vocabulary
    kv_scales: list[LayerScales] | None  # of each layer; None: the cache is not quantised


def open_weights(directory: Path, config: CheckpointConfig, rank: int = 0) -> TensorSource:
    """The rank's file in `directory`, memory-mapped; the only one a rank opens."""
    return open_checked(directory / layout.rank_file(rank), decoder_tensors(config, rank))


def load_weights(
    source: TensorSource,
    config: CheckpointConfig,
    device: torch.device,
    all_reduce: AllReduce | None = None,
) -> DecoderWeights:
    """Maps (on a CPU) or copies every tensor; linears are widened where the memory, which the
    ranks share, allows."""

    def read(name: str) -> torch.Tensor:
        return source.read(name).to(device)

    layers, kv_scales = [], list[LayerScales]()
    for i in range(config.decoder.num_hidden_layers):
        prefix = ENGINE_LAYER.format(i=i)
        tensors = {name: read(prefix + name) for name in decoder_layer_tensors(config, i)}
        formats = {name: config.linear_format(i, name) for name in DECODER_LINEARS}
        layers.append(DecoderLayer(config.decoder, tensors, all_reduce, number_format=formats))
        if (scales := read_scales(source, config, i)) is not None:
            kv_scales.append(scales)
    lm_head = QuantizableLinear(
        read(f"{HEAD}.weight"),
        number_format=config.head_format,
        scales=config.head_format.read_scales(source.read, HEAD),
        output_dtype=torch.float32,
    )
    if decoder_may_widen(config, device, total_memory_bytes(device)):
        for layer in layers:
            for name in DECODER_LINEARS:
                layer.linear(name).widen()
        lm_head.widen()
    return DecoderWeights(
        embedding=read("transformer.vocab_embedding.weight"),
        layers=layers,
        final_norm=read("transformer.ln_f.weight"),
        lm_head=lm_head,
        kv_scales=kv_scales or None,
    )
