"""Decoder part of the conversion: layer by layer, calibrated, quantised, written.

The calibration samples' hidden states are carried from layer to layer, so a model of any depth
needs one layer in memory: its tensors in the checkpoint's dtype and in float32, and the states.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from build.checkpoint.amax_observer import AmaxObserver
from build.checkpoint.calibration_set import CalibrationSample
from build.checkpoint.cast import amax, cast
from build.checkpoint.quantize import quantize_layer
from build.checkpoint.report import AttentionReport, LinearReport
from build.checkpoint.shard import shard
from build.sources.source import WeightSource
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.checkpoint_tensors import decoder_tensors, rank_file
from nvlm.decoder_model import DecoderLayer, causal_attention, embed, rope_tables
from nvlm.dtypes import TORCH_DTYPES
from nvlm.mapping import Mapping
from nvlm.safetensors_files import SafetensorsWriter
from nvlm.tensor_names import (
    DECODER_LAYER,
    EMBED_TOKENS,
    ENGINE_FIRST_TENSORS,
    ENGINE_LAYER,
    ENGINE_LAYER_TENSORS,
    ENGINE_LINEARS,
    ENGINE_TOP_TENSORS,
    EngineTensor,
)


@dataclass(frozen=True, slots=True)
class DecoderStep:
    linears: list[LinearReport]
    attentions: list[AttentionReport]


def convert_decoder(
    source: WeightSource,
    output_dir: Path,
    config: CheckpointConfig,
    samples: list[CalibrationSample],
    image_embeddings: torch.Tensor,
    device: torch.device,
) -> DecoderStep:
    """Writes every rank's file, in one pass over the source.

    image_embeddings: [tiles of all samples, tokens_per_tile, hidden_size]. `samples` may be empty
    when nothing is quantised.
    """
    hidden = _embed_samples(source, config, samples, image_embeddings, device)
    result = DecoderStep([], [])
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                SafetensorsWriter(output_dir / rank_file(rank), decoder_tensors(config, rank))
            )
            for rank in range(config.world_size)
        ]
        files = _RankFiles(writers, config)
        dtype = TORCH_DTYPES[config.dtype]
        for tensor in ENGINE_TOP_TENSORS:
            source_name = tensor.sources[0]
            files.write(tensor, None, [cast(source_name, source.read(source_name), dtype)])
        for i in tqdm(range(config.decoder.num_hidden_layers), "decoder layers"):
            _convert_layer(source, files, config, i, hidden, result, device)
    return result


@dataclass(frozen=True, slots=True)
class _RankFiles:
    """The files of all ranks, written together."""

    writers: list[SafetensorsWriter]
    config: CheckpointConfig

    def write(self, tensor: EngineTensor, layer: int | None, parts: list[torch.Tensor]) -> None:
        """Each rank's part of a tensor of `layer` (None: of the top), given whole by source."""
        for rank, writer in enumerate(self.writers):
            mapping = self.config.mapping(rank)
            if (prefix := self._prefix(mapping, tensor, layer)) is not None:
                pieces = [
                    shard(tensor, source, part, self.config.decoder, mapping)
                    for source, part in zip(tensor.sources, parts, strict=True)
                ]
                writer.write(prefix + tensor.name, torch.cat(pieces))

    def write_scale(self, name: str, layer: int, scale: torch.Tensor) -> None:
        self.write(EngineTensor(name, (name,)), layer, [scale])

    def _prefix(self, mapping: Mapping, tensor: EngineTensor, layer: int | None) -> str | None:
        """What stands before the tensor's name in a rank's file; None if it is not there."""
        if layer is None:
            is_here = (
                mapping.is_first_stage if tensor in ENGINE_FIRST_TENSORS else mapping.is_last_stage
            )
            return "" if is_here else None
        layers = mapping.layers(self.config.decoder.num_hidden_layers)
        return ENGINE_LAYER.format(i=layers.index(layer)) if layer in layers else None


def _convert_layer(
    source: WeightSource,
    files: _RankFiles,
    config: CheckpointConfig,
    i: int,
    hidden: list[torch.Tensor],
    result: DecoderStep,
    device: torch.device,
) -> None:
    """A function of its own so that nothing of a layer outlives it."""
    tensors = _read_layer(source, i, TORCH_DTYPES[config.dtype])
    prefix = ENGINE_LAYER.format(i=i)
    if hidden:
        layer = DecoderLayer(config.decoder, {k: v.to(device) for k, v in tensors.items()})
        linears, attention = _calibrate_layer(layer, prefix, config, hidden)
        del layer
        tensors = quantize_layer(tensors, config, linears, attention)
        result.linears.extend(linears.values())
        result.attentions.append(attention)
    decoder = config.decoder
    query_rows = decoder.num_attention_heads * decoder.head_dim
    key_value_rows = decoder.num_key_value_heads * decoder.head_dim
    for tensor in ENGINE_LAYER_TENSORS:
        whole = tensors.pop(tensor.name)
        rows = [query_rows, key_value_rows, key_value_rows]
        files.write(tensor, i, list(whole.split(rows)) if len(tensor.sources) > 1 else [whole])
    for name, scale in tensors.items():
        files.write_scale(name, i, scale)


def _embed_samples(
    source: WeightSource,
    config: CheckpointConfig,
    samples: list[CalibrationSample],
    image_embeddings: torch.Tensor,
    device: torch.device,
) -> list[torch.Tensor]:
    """Input of the first layer, [num_tokens, hidden_size] for each sample."""
    if not samples:
        return []
    embedding = source.read(EMBED_TOKENS)  # memory-mapped: only the rows that are used are read
    tables = image_embeddings.split([len(sample.tiles) for sample in samples])
    dtype = TORCH_DTYPES[config.dtype]
    hidden = []
    for sample, table in zip(samples, tables, strict=True):
        token_ids = torch.tensor(sample.prompt.token_ids)
        hidden.append(embed(token_ids, embedding, table.flatten(0, 1), dtype).to(device))
    return hidden


def _read_layer(source: WeightSource, i: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One layer under TensorRT-LLM's names, cast, with q, k and v stacked."""
    prefix = DECODER_LAYER.format(i=i)
    tensors = {}
    for tensor in ENGINE_LAYER_TENSORS:
        parts = [cast(prefix + part, source.read(prefix + part), dtype) for part in tensor.sources]
        tensors[tensor.name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return tensors


def _calibrate_layer(
    layer: DecoderLayer, prefix: str, config: CheckpointConfig, hidden: list[torch.Tensor]
) -> tuple[dict[str, LinearReport], AttentionReport]:
    """Runs every sample through the layer in the unquantised dtype, in place."""
    observer = AmaxObserver(prefix, torch.finfo(TORCH_DTYPES[config.dtype]).max)
    for name in ENGINE_LINEARS:
        layer.linear(name).widen()
        observer.watch_inputs({name: layer.linear(name)})

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for name, x in (("q", q), ("k", k), ("v", v)):
            observer.see(name, x)
        return causal_attention(q, k, v, first_position=0).to(q.dtype)

    decoder = config.decoder
    for index, rows in enumerate(hidden):
        positions = torch.arange(len(rows), device=rows.device)
        cos, sin = rope_tables(positions, decoder.head_dim, decoder.rope_theta)
        hidden[index] = layer(rows, cos, sin, attend)
    maxima = observer.maxima
    linears = {
        name: LinearReport(prefix + name, amax(layer.linear(name).weight), maxima[name])
        for name in ENGINE_LINEARS
    }
    return linears, AttentionReport(prefix + "attention", maxima["q"], maxima["k"], maxima["v"])
