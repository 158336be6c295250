"""A folder in Hugging Face's layout that vLLM, transformers and others load, in FP8."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from build.conversion.dummy_heads import with_dummy_heads
from build.conversion.output_files import OutputFiles
from build.conversion.output_folder import LayerParts, OutputFolder, Rows
from build.conversion.report.quantization_report import QuantizationReport
from build.exports.model_files import ModelFiles
from build.exports.schemes import Quantised, Scheme
from build.exports.tensors import (
    BEFORE_CACHE_SCALES,
    MAX_SHARD_BYTES,
    ExportTensors,
    is_quantised,
)
from build.sources.source import WeightSource
from nvlm.formats import layout
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.manifest import Kind, sha256_of
from nvlm.formats.safetensors_reader import TensorInfo, total_bytes
from nvlm.formats.tensor_names import (
    DECODER_LAYER,
    ENGINE_LAYER_TENSORS,
    PROJECTOR_PREFIX,
    EngineTensor,
)
from nvlm.model.config import NUM_DUMMY_HEADS, NVLMConfig, VisionConfig
from nvlm.model.number_formats import FP8, UNQUANTIZED, LinearScales, NumberFormat
from nvlm.program.json_files import write_json_atomically

_SLACK_BYTES = 64 << 20  # tokenizer, headers, reports


@dataclass(frozen=True, slots=True)
class HuggingFaceFormat:
    """What the command line chooses."""

    scheme: Scheme  # names of scales and the configuration that readers want
    published: Path | None  # the model's folder; None: it is in another layout
    is_text_only: bool = False  # without vision and projector
    vision_format: NumberFormat = UNQUANTIZED  # of the ViT's linears
    max_shard_bytes: int = MAX_SHARD_BYTES  # of one file of weights
    kind: Kind = "export"  # of the directory's manifest

    def arguments(self, source: WeightSource) -> dict[str, Any]:
        files = self._model_files(source, "bfloat16").copied()
        return {
            "output_format": self.scheme.name,
            "text_only": self.is_text_only,
            "vision_quant_algo": self.vision_format.name,
            "max_shard_bytes": self.max_shard_bytes,
            "copied_sha256": {path.name: sha256_of(path) for path in files},
        }

    def folder(
        self, source: WeightSource, vision: VisionConfig, config: CheckpointConfig
    ) -> OutputFolder:
        tensors = self._tensors(source.config, config)
        files = tensors.files(self.max_shard_bytes)
        beside = self._model_files(source, config.dtype)
        return HuggingFaceFolder(tensors, files, beside)

    @property
    def needs_vision_scales(self) -> bool:
        return self.vision_format is not UNQUANTIZED

    def needed_bytes(self, model: NVLMConfig, config: CheckpointConfig) -> int:
        return total_bytes(self._tensors(model, config).all().values()) + _SLACK_BYTES

    def _tensors(self, model: NVLMConfig, config: CheckpointConfig) -> ExportTensors:
        return ExportTensors(
            stored_model(model),
            config,
            self.scheme,
            self.vision_format,
            not self.is_text_only,
        )

    def _model_files(self, source: WeightSource, dtype: str) -> ModelFiles:
        model = stored_model(source.config)
        return ModelFiles(model, dtype, source.tokenizer_dir, self.published, not self.is_text_only)


def stored_model(model: NVLMConfig) -> NVLMConfig:
    """The model with the dummy heads that its readers expect."""
    return replace(model, vision=replace(model.vision, num_dummy_heads=NUM_DUMMY_HEADS))


class HuggingFaceFolder:
    """Every tensor under its published name, quantised ones with their scales beside them."""

    has_vision: bool
    vision_format: NumberFormat

    def __init__(
        self,
        tensors: ExportTensors,
        files: dict[str, dict[str, TensorInfo]],
        beside: ModelFiles,
    ) -> None:
        self.has_vision, self.vision_format = tensors.has_vision, tensors.vision_format
        self._tensors = tensors
        self._files = files
        self._beside = beside
        self._file_of = {name: file for file, infos in files.items() for name in infos}

    def files(self) -> dict[str, dict[str, TensorInfo]]:
        return self._files

    def vision_writes(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        if self.has_vision:
            yield from self._placed(self._tensors.of_vision(tuple(names)))

    def write_vision(
        self, out: OutputFiles, name: str, tensor: torch.Tensor, scales: LinearScales | None
    ) -> None:
        if not self.has_vision:
            return
        whole = with_dummy_heads(name, tensor, self._tensors.model.vision)
        if scales is None or self.vision_format is UNQUANTIZED:
            self._append(out, name, whole)
            return
        self._append(out, name, self.vision_format.quantize(whole, scales.weight))
        self._append_scales(out, name.removesuffix(".weight"), scales)

    def writes(
        self, tensors: tuple[EngineTensor, ...], layer: int | None
    ) -> Iterator[tuple[str, str]]:
        return self._placed(self._tensors.of_decoder(tensors, layer))

    def write_layer(self, out: OutputFiles, parts: LayerParts) -> None:
        prefix = self._tensors.name(DECODER_LAYER.format(i=parts.index))
        config = self._tensors.config
        for tensor in ENGINE_LAYER_TENSORS:
            for source in tensor.sources:
                self._write_rows(out, prefix + source, parts.rows(tensor, source))
                if is_quantised(tensor, parts.index, config):
                    scales = parts.scales[tensor.name.removesuffix(".weight")]
                    self._append_scales(out, prefix + source.removesuffix(".weight"), scales)
            if tensor.name == BEFORE_CACHE_SCALES and config.kv_cache_format is not UNQUANTIZED:
                self._append_cache_scales(out, parts)

    def write_top(
        self,
        out: OutputFiles,
        tensor: EngineTensor,
        rows: Rows,
        scales: LinearScales | None = None,
    ) -> None:
        (source,) = tensor.sources
        name = self._tensors.name(source)
        self._write_rows(out, name, rows)
        if scales is not None:
            self._append_scales(out, name.removesuffix(".weight"), scales)

    def finish(self, staging: Path, report: QuantizationReport | None) -> None:
        ignored = self._tensors.excluded()
        if self.has_vision:
            ignored.append(PROJECTOR_PREFIX)
            if self.vision_format is UNQUANTIZED:
                ignored.append("vision_model.")
        has_kv_cache = self._tensors.config.kv_cache_format is not UNQUANTIZED
        quantised = Quantised(has_kv_cache, tuple(ignored))
        scheme = self._tensors.scheme
        config = {**self._beside.config(), "quantization_config": scheme.config(quantised)}
        for path in self._beside.copied():
            shutil.copyfile(path, staging / path.name)
        for name, values in scheme.files(quantised).items():
            write_json_atomically(staging / name, values)
        if len(self._files) > 1:
            sizes = (total_bytes(infos.values()) for infos in self._files.values())
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": self._file_of}
            write_json_atomically(staging / layout.WEIGHTS_INDEX, index)
        write_json_atomically(staging / layout.CONFIG, config)

    def _placed(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        return ((self._file_of[name], name) for name in names)

    def _append(self, out: OutputFiles, name: str, block: torch.Tensor) -> None:
        out.append(self._file_of[name], name, block)

    def _write_rows(self, out: OutputFiles, name: str, rows: Rows) -> None:
        for block in rows.blocks:
            self._append(out, name, block)

    def _append_scales(self, out: OutputFiles, linear: str, scales: LinearScales) -> None:
        weight, activation = self._tensors.scales(linear)
        self._append_scale(out, weight, scales.weight)
        self._append_scale(out, activation, scales.activation)

    def _append_cache_scales(self, out: OutputFiles, parts: LayerParts) -> None:
        seen = parts.attention
        assert seen is not None, "a quantised cache was calibrated"
        largest = (seen.q_amax, seen.k_amax, seen.v_amax)
        names = self._tensors.cache_scales(parts.index)
        for name, amax in zip(names, largest, strict=True):
            self._append_scale(out, name, FP8.scale_from_amax(amax))

    def _append_scale(self, out: OutputFiles, name: str, scale: float) -> None:
        self._append(out, name, torch.full(self._tensors.scheme.scale_shape, scale))
