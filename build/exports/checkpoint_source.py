"""A finished checkpoint directory as a source of published tensors, as they are stored there.

Ranks' parts are put together and fused tensors taken apart: the other way of shard.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from build.conversion.report.quantization_report import AttentionReport, QuantizationReport
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors, open_checked, vision_tensors
from nvlm.formats.manifest import read_manifest
from nvlm.formats.mapping import Mapping
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    ENGINE_FIRST_TENSORS,
    ENGINE_LAST_TENSORS,
    ENGINE_LAYER,
    ENGINE_LAYER_TENSORS,
    HEAD,
    KEY_VALUE_SOURCES,
    QKV_SOURCES,
    EngineTensor,
)
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.config import NVLMConfig
from nvlm.model.decoder import DECODER_LINEARS
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import LinearScales, NumberFormat
from nvlm.program.errors import UserError


class CheckpointSource:
    """Peak memory of a read: the tensor, if it is on several ranks, else nothing.

    Raises `UserError` for a directory that is not finished, is damaged or holds no FP8 decoder.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self._manifest = read_manifest(checkpoint_dir, "checkpoint")
        stored = CheckpointConfig.read(checkpoint_dir / layout.CONFIG)
        if not stored.weight_format.scale_shapes:
            raise UserError(
                f"{checkpoint_dir} has --quant_algo none, expected FP8 linears to export; convert "
                "with --quant_algo FP8"
            )
        vision = VisionCheckpoint.read(checkpoint_dir / layout.VISION)
        self.config = NVLMConfig(vision.config, stored.decoder, vision.tiling)
        self.whole = replace(stored, tp_size=1, pp_size=1)
        self.tokenizer_dir = checkpoint_dir / layout.TOKENIZER
        self.report_files = [checkpoint_dir / name for name in (layout.REPORT, layout.REPORT_PAGE)]
        self._report = QuantizationReport.read(checkpoint_dir / layout.REPORT)
        self._mappings = stored.mapping().all_ranks()
        self._ranks = [
            open_checked(
                checkpoint_dir / layout.rank_file(mapping.rank),
                decoder_tensors(stored, mapping.rank),
            )
            for mapping in self._mappings
        ]
        self._vision_checkpoint = vision
        self._vision = open_checked(
            checkpoint_dir / layout.VISION / layout.WEIGHTS,
            vision_tensors(vision.config, TORCH_DTYPES[vision.dtype]),
        )
        self._tensors = {
            source: (tensor, None, source)
            for tensor in ENGINE_FIRST_TENSORS + ENGINE_LAST_TENSORS
            for source in tensor.sources
        } | {
            DECODER_LAYER.format(i=i) + source: (tensor, i, source)
            for i in range(stored.decoder.num_hidden_layers)
            for tensor in ENGINE_LAYER_TENSORS
            for source in tensor.sources
        }

    def read(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            return self._vision.read(name)
        tensor, layer, source = self._tensors[name]
        parts: dict[int, torch.Tensor] = {}  # by what they hold: heads may be on several ranks
        for mapping, reader in self._holders(tensor, layer):
            written = self._written(tensor.name, layer, mapping)
            stored = reader.read(written)
            start, part = self._part(tensor, source, stored, mapping)
            parts.setdefault(start, part)
        joined = [parts[start] for start in sorted(parts)]
        if len(joined) > 1:
            whole = torch.cat(joined, dim=1 if tensor.split == "row" else 0)
        else:
            whole = joined[0]
        # The head's last rank holds zero rows that make all ranks equal.
        return whole[: self.config.decoder.vocab_size] if layer is None else whole

    def scales(self, layer: int) -> dict[str, LinearScales]:
        """The scales that the layer's linears were quantised with, by their names in
        `DECODER_LINEARS`; linears that stay unquantised have none."""
        mapping, reader = self._holders(ENGINE_LAYER_TENSORS[0], layer)[0]
        found = {}
        for linear in DECODER_LINEARS:
            written = self._written(linear, layer, mapping)
            scales = self.whole.linear_format(layer, linear).read_scales(reader.read, written)
            if scales is not None:
                found[linear] = scales
        return found

    def head_scales(self) -> LinearScales | None:
        """The scales that the head was quantised with; None where it stays unquantised."""
        _, reader = self._holders(ENGINE_LAST_TENSORS[-1], None)[0]
        return self.whole.head_format.read_scales(reader.read, HEAD)

    def vision_scales(self, number_format: NumberFormat) -> dict[str, LinearScales]:
        """The scales of the ViT's linears, by full name; none for an unquantised format."""
        return self._vision_checkpoint.read_scales(number_format)

    def attention(self, layer: int) -> AttentionReport:
        return self._report.rows_of(ENGINE_LAYER.format(i=layer))[1]

    def provenance(self) -> dict[str, Any]:
        return {"layout": "checkpoint", "digest": self._manifest.digest}

    def _holders(
        self, tensor: EngineTensor, layer: int | None
    ) -> list[tuple[Mapping, SafetensorsReader]]:
        """The ranks that hold a tensor."""
        decoder = self.config.decoder

        def holds(mapping: Mapping) -> bool:
            if layer is not None:
                return layer in mapping.layers(decoder.num_hidden_layers)
            is_first = tensor in ENGINE_FIRST_TENSORS
            return mapping.is_first_stage if is_first else mapping.is_last_stage

        pairs = zip(self._mappings, self._ranks, strict=True)
        return [(mapping, reader) for mapping, reader in pairs if holds(mapping)]

    def _written(self, name: str, layer: int | None, mapping: Mapping) -> str:
        """The name of a tensor in a rank's file."""
        if layer is None:
            return name
        layers = mapping.layers(self.config.decoder.num_hidden_layers)
        return ENGINE_LAYER.format(i=layers.index(layer)) + name

    def _part(
        self, tensor: EngineTensor, source: str, stored: torch.Tensor, mapping: Mapping
    ) -> tuple[int, torch.Tensor]:
        """What a rank holds of `source`, and where in the whole it begins."""
        if tensor.split is None:
            return 0, stored
        if len(tensor.sources) == 1:
            return mapping.tp_rank, stored
        decoder = self.config.decoder
        first = 0
        for stem in QKV_SOURCES:
            num_heads = decoder.num_attention_heads
            if stem in KEY_VALUE_SOURCES:
                num_heads = decoder.num_key_value_heads
            held = mapping.shard(num_heads * decoder.head_dim, num_heads)
            if source.startswith(stem):
                return held.start, stored[first : first + len(held)]
            first += len(held)
        raise AssertionError(f"{source} is no part of {tensor.name}")
