"""What a conversion writes into: the folder of one output format, which names and places tensors.

The steps read, calibrate and quantise; a folder says which files hold the result, under which
names, and writes what stands beside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from build.conversion.output_files import OutputFiles
from build.conversion.report.quantization_report import AttentionReport, QuantizationReport
from build.sources.source import WeightSource
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.manifest import Kind
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.formats.tensor_names import EngineTensor
from nvlm.model.config import NVLMConfig, VisionConfig
from nvlm.model.number_formats import LinearScales, NumberFormat


@dataclass(frozen=True, slots=True)
class Rows:
    """A tensor as it is stored: blocks of consecutive rows, and how many rows there are."""

    blocks: Iterator[torch.Tensor]  # [some rows, ...] each, in order
    num_rows: int  # of all blocks


@dataclass(frozen=True, slots=True)
class LayerParts:
    """A decoder layer on its way to the disk."""

    index: int  # of the layer, from 0
    # Of a published source of an engine tensor; each is asked for once, in the order of
    # `ENGINE_LAYER_TENSORS`.
    rows: Callable[[EngineTensor, str], Rows]
    scales: Mapping[str, LinearScales]  # of each quantised linear, by its name in `DECODER_LINEARS`
    attention: AttentionReport | None  # None: nothing was calibrated


class OutputFolder(Protocol):
    """Places one conversion's tensors; `writes` and `vision_writes` are (file, tensor) pairs."""

    @property
    def vision_format(self) -> NumberFormat:
        """What the linears of the ViT's layers are stored in."""
        ...

    @property
    def has_vision(self) -> bool: ...

    def files(self) -> dict[str, dict[str, TensorInfo]]:
        """The tensors of every file, in the order in which they are written."""
        ...

    def vision_writes(self, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        """What `write_vision` writes for these tensors of the vision model."""
        ...

    def write_vision(
        self, out: OutputFiles, name: str, tensor: torch.Tensor, scales: LinearScales | None
    ) -> None:
        """A tensor in the checkpoint's dtype, without dummy heads where they are zero. scales: of
        a linear's weight that is stored in `vision_format`."""
        ...

    def writes(
        self, tensors: tuple[EngineTensor, ...], layer: int | None
    ) -> Iterator[tuple[str, str]]:
        """What `write_layer` or `write_top` write; `layer` None is what stands around the
        layers."""
        ...

    def write_layer(self, out: OutputFiles, parts: LayerParts) -> None: ...

    def write_top(
        self,
        out: OutputFiles,
        tensor: EngineTensor,
        rows: Rows,
        scales: LinearScales | None = None,
    ) -> None:
        """The embedding, the last norm or the head. scales: of a quantised head."""
        ...

    def finish(self, staging: Path, report: QuantizationReport | None) -> None:
        """Writes what is not weights."""
        ...


class OutputFormat(Protocol):
    """What --output_format chooses."""

    @property
    def kind(self) -> Kind: ...

    @property
    def needs_vision_scales(self) -> bool:
        """Whether linears of the ViT are stored quantised."""
        ...

    def arguments(self, source: WeightSource) -> dict[str, Any]:
        """What of this choice the result depends on, for the manifest."""
        ...

    def folder(
        self, source: WeightSource, vision: VisionConfig, config: CheckpointConfig
    ) -> OutputFolder:
        """vision: without dummy heads where all of them are zero."""
        ...

    def needed_bytes(self, model: NVLMConfig, config: CheckpointConfig) -> int:
        """Disk that the folder takes."""
        ...
