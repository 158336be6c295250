"""A checkpoint directory in TensorRT-LLM's format: ranks' files, and vision/ beside them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from build.conversion.output_files import OutputFiles
from build.conversion.output_folder import LayerParts, Rows
from build.conversion.quantization.shard import RankFiles
from build.conversion.report.quantization_report import QuantizationReport
from build.output.safetensors_writer import SafetensorsWriter
from build.sources.source import WeightSource
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import (
    decoder_layer_tensors,
    decoder_tensors,
    vision_linears,
    vision_scales,
    vision_tensors,
)
from nvlm.formats.manifest import Kind
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.formats.tensor_names import ENGINE_LAYER_TENSORS, HEAD, KV_CACHE_SCALE, EngineTensor
from nvlm.inputs.tokenizer import tokenizer_files
from nvlm.model.config import NVLMConfig, VisionConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.number_formats import UNQUANTIZED, LinearScales, NumberFormat
from nvlm.model.vision import VISION_FORMAT
from nvlm.planning.memory_plan import checkpoint_bytes
from nvlm.program.json_files import write_json_atomically

_VISION_FILE = f"{layout.VISION}/{layout.WEIGHTS}"
_BY_NAME = {tensor.name: tensor for tensor in ENGINE_LAYER_TENSORS}


@dataclass(frozen=True, slots=True)
class TensorRTLLMFormat:
    kind: Kind = "checkpoint"  # of the directory's manifest
    needs_vision_scales: bool = False  # the ViT's linears are not stored quantised

    def arguments(self, source: WeightSource) -> dict[str, Any]:
        return {}

    def folder(
        self, source: WeightSource, vision: VisionConfig, config: CheckpointConfig
    ) -> TensorRTLLMFolder:
        return TensorRTLLMFolder(source, vision, config)

    def needed_bytes(self, model: NVLMConfig, config: CheckpointConfig) -> int:
        return checkpoint_bytes(config, model.vision)


@dataclass(frozen=True, slots=True)
class TensorRTLLMFolder:
    """The ViT stays in `dtype`; its scales stand in a file of their own."""

    source: WeightSource  # the published weights
    vision: VisionConfig  # shape of the ViT as it is written
    config: CheckpointConfig  # of the decoder
    vision_format: NumberFormat = UNQUANTIZED  # of the ViT's linears, which stay in `dtype`
    has_vision: bool = True  # always, in this format

    def files(self) -> dict[str, dict[str, TensorInfo]]:
        files = {_VISION_FILE: vision_tensors(self.vision, TORCH_DTYPES[self.config.dtype])}
        for rank in range(self.config.world_size):
            files[layout.rank_file(rank)] = decoder_tensors(self.config, rank)
        return files

    def vision_writes(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        return ((_VISION_FILE, name) for name in names)

    def write_vision(
        self, out: OutputFiles, name: str, tensor: torch.Tensor, scales: LinearScales | None
    ) -> None:
        out.append(_VISION_FILE, name, tensor)

    def writes(
        self, tensors: tuple[EngineTensor, ...], layer: int | None
    ) -> Iterator[tuple[str, str]]:
        if layer is None:
            names = []
            for tensor in tensors:
                names.append(tensor.name)
                if tensor.name == f"{HEAD}.weight":
                    names += [f"{HEAD}.{kind}" for kind in self.config.head_format.scale_shapes]
        else:
            names = list(decoder_layer_tensors(self.config, layer))
        for name in names:
            for mapping, written in RankFiles(self.config).names(name, layer):
                yield layout.rank_file(mapping.rank), written

    def write_layer(self, out: OutputFiles, parts: LayerParts) -> None:
        files = RankFiles(self.config)
        scales: dict[str, torch.Tensor] = {}
        for linear, found in parts.scales.items():
            scales |= self.config.weight_format.scale_tensors(linear, found)
        if parts.attention is not None:
            scales[KV_CACHE_SCALE] = torch.tensor([parts.attention.kv_cache_scaling_factor])
        for name in decoder_layer_tensors(self.config, parts.index):
            if name in scales:
                files.append_scale(out, name, parts.index, scales[name])
                continue
            tensor = _BY_NAME[name]
            for source in tensor.sources:
                rows = parts.rows(tensor, source)
                files.append(out, tensor, parts.index, source, rows.blocks, rows.num_rows)

    def write_top(
        self,
        out: OutputFiles,
        tensor: EngineTensor,
        rows: Rows,
        scales: LinearScales | None = None,
    ) -> None:
        (source,) = tensor.sources
        files = RankFiles(self.config)
        files.append(out, tensor, None, source, rows.blocks, rows.num_rows)
        if scales is not None:
            for name, scale in self.config.head_format.scale_tensors(HEAD, scales).items():
                files.append_scale(out, name, None, scale)

    def finish(self, staging: Path, report: QuantizationReport | None) -> None:
        write_json_atomically(staging / layout.CONFIG, self.config.to_json())
        write_json_atomically(
            staging / layout.VISION / layout.CONFIG,
            {
                "dtype": self.config.dtype,
                "vision": asdict(self.vision),
                "tiling": asdict(self.source.config.tiling),
            },
        )
        tokenizer_dir = staging / layout.TOKENIZER
        tokenizer_dir.mkdir(exist_ok=True)
        for path in tokenizer_files(self.source.tokenizer_dir):
            shutil.copyfile(path, tokenizer_dir / path.name)
        if report is not None:
            self._write_vision_scales(staging, report)

    def _write_vision_scales(self, staging: Path, report: QuantizationReport) -> None:
        """Not after calibration with text only."""
        path = staging / layout.VISION / layout.SCALES
        path.unlink(missing_ok=True)  # a run that was interrupted here left it
        linears = set(vision_linears(self.vision))
        rows = [row for row in report.linears if row.linear in linears]
        if not rows:
            return
        with SafetensorsWriter(path, vision_scales(self.vision)) as writer:
            for row in rows:
                for name, scale in VISION_FORMAT.scale_tensors(row.linear, row.scales).items():
                    writer.write(name, scale)
