"""From rows of a published tensor to what each rank holds of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from build.conversion.output_files import OutputFiles
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.mapping import Mapping
from nvlm.formats.tensor_names import (
    ENGINE_FIRST_TENSORS,
    ENGINE_LAYER,
    HEAD,
    KEY_VALUE_SOURCES,
    EngineTensor,
)
from nvlm.model.config import DecoderConfig


def shard(
    tensor: EngineTensor,
    source: str,
    block: torch.Tensor,
    rows: range,
    num_rows: int,
    decoder: DecoderConfig,
    mapping: Mapping,
) -> torch.Tensor:
    """The rank's part of `block`, which holds `rows` of the `num_rows` of `source`: a view."""
    if tensor.split is None:
        return block
    if tensor.split == "row":
        held = mapping.shard(block.shape[1])
        return block[:, held.start : held.stop]
    num_heads = decoder.num_key_value_heads if source.startswith(KEY_VALUE_SOURCES) else None
    held = mapping.shard(num_rows, num_heads)
    start, stop = max(held.start, rows.start), min(held.stop, rows.stop)
    return block[start - rows.start : max(start, stop) - rows.start]


class RankFiles:
    """Writes whole tensors of the decoder into the files of the ranks that hold them.

    `layer` None means the tensors before and after the layers.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config

    def names(self, name: str, layer: int | None) -> Iterator[tuple[Mapping, str]]:
        """The ranks that hold a tensor, with its name there."""
        for mapping in self._config.mapping().all_ranks():
            if layer is None:
                is_first = any(name == tensor.name for tensor in ENGINE_FIRST_TENSORS)
                if mapping.is_first_stage if is_first else mapping.is_last_stage:
                    yield mapping, name
                continue
            layers = mapping.layers(self._config.decoder.num_hidden_layers)
            if layer in layers:
                yield mapping, ENGINE_LAYER.format(i=layers.index(layer)) + name

    def append(
        self,
        out: OutputFiles,
        tensor: EngineTensor,
        layer: int | None,
        source: str,
        blocks: Iterator[torch.Tensor],
        num_rows: int,
    ) -> None:
        """All `blocks` of rows of `source` (without the layer's prefix), `num_rows` in all."""
        decoder, start = self._config.decoder, 0
        padding = 0
        if tensor.name == f"{HEAD}.weight":
            padding = self._config.mapping().padded_vocab_size(num_rows) - num_rows
        for block in _with_zero_rows(blocks, padding):
            rows = range(start, start + len(block))
            for mapping, name in self.names(tensor.name, layer):
                part = shard(tensor, source, block, rows, num_rows + padding, decoder, mapping)
                if len(part):
                    out.append(layout.rank_file(mapping.rank), name, part)
            start = rows.stop

    def append_scale(
        self, out: OutputFiles, name: str, layer: int | None, scale: torch.Tensor
    ) -> None:
        """All of it into the file of every rank that holds the layer, or the head."""
        for mapping, written in self.names(name, layer):
            out.append(layout.rank_file(mapping.rank), written, scale)


def _with_zero_rows(blocks: Iterator[torch.Tensor], num_rows: int) -> Iterator[torch.Tensor]:
    block = None
    for block in blocks:
        yield block
    if num_rows and block is not None:
        yield block.new_zeros(num_rows, *block.shape[1:])
