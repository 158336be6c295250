"""Vision part of the conversion: one dtype, no dummy heads, FP8 scales, image embeddings.

Peak memory: one layer in float32, the calibration tiles' hidden states, one tensor of the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from build.checkpoint.amax_observer import AmaxObserver
from build.checkpoint.cast import amax, cast
from build.checkpoint.dummy_heads import converted_vision_config, without_dummy_heads
from build.checkpoint.report import LinearReport
from build.sources.source import WeightSource
from nvlm import fp8
from nvlm.checkpoint_tensors import vision_scales, vision_tensors
from nvlm.config import VisionConfig
from nvlm.dtypes import TORCH_DTYPES
from nvlm.inputs.tiling import normalize
from nvlm.json_files import write_json_atomically
from nvlm.safetensors_files import SafetensorsWriter
from nvlm.tensor_names import (
    ACTIVATION_SCALE,
    PROJECTOR_PREFIX,
    VISION_LAYER,
    VISION_LINEARS,
    WEIGHT_SCALE,
)
from nvlm.vision_model import VisionLayer, VisionModel, linear_of

_TILES_PER_BATCH = 7  # one image's tiles


@dataclass(frozen=True, slots=True)
class VisionStep:
    """image_embeddings: [num_tiles, tokens_per_tile, output_size] float32 of the tiles given."""

    image_embeddings: torch.Tensor
    report: list[LinearReport]


def convert_vision(
    source: WeightSource,
    output_dir: Path,
    dtype_name: str,
    tiles: list[NDArray[np.uint8]],
    device: torch.device,
) -> VisionStep:
    """Writes `config.json`, `model.safetensors` and, given tiles, `scales.safetensors`.

    tiles: [num_tiles, S, S, 3] uint8 of each calibration sample; none of them for no calibration.
    They run through the cast weights in float32, layer by layer.
    """
    config = converted_vision_config(source)
    output_dir.mkdir()
    write_json_atomically(
        output_dir / "config.json",
        {"dtype": dtype_name, "vision": asdict(config), "tiling": asdict(source.config.tiling)},
    )
    tensors = vision_tensors(config, TORCH_DTYPES[dtype_name])
    with torch.device("meta"):
        model = VisionModel(config)
    hidden: list[torch.Tensor] = []  # of a few tiles each
    report: list[LinearReport] = []
    with SafetensorsWriter(output_dir / "model.safetensors", tensors) as writer:
        loader = _Loader(source, config, TORCH_DTYPES[dtype_name], writer, device, bool(tiles))
        loader.fill(model.vision_model.embeddings, "vision_model.embeddings.")
        for batch in _batches(tiles):
            hidden.append(model.vision_model.embeddings(normalize(batch).to(device)))
        for i in tqdm(range(config.num_hidden_layers), "vision layers"):
            with torch.device("meta"):
                layer = VisionLayer(config)
            loader.fill(layer, VISION_LAYER.format(i=i))
            if tiles:
                report += _calibrate_layer(layer, VISION_LAYER.format(i=i), hidden, loader.dtype)
        loader.fill(model.mlp1, PROJECTOR_PREFIX)
        embeddings = [model.project(batch).cpu() for batch in hidden]
    if report:
        _write_scales(output_dir / "scales.safetensors", config, report)
    none = torch.empty(0, config.tokens_per_tile, config.output_size)
    return VisionStep(torch.cat([none, *embeddings]), report)


def _batches(tiles: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    """A few tiles at a time, in order."""
    for image_tiles in tiles:
        for start in range(0, len(image_tiles), _TILES_PER_BATCH):
            yield image_tiles[start : start + _TILES_PER_BATCH]


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads, casts and writes the tensors of one module at a time."""

    source: WeightSource
    config: VisionConfig
    dtype: torch.dtype
    writer: SafetensorsWriter
    device: torch.device
    is_run: bool

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Gives a module on the meta device its weights: the values of `dtype`, as float32.

        A module that is not run stays empty.
        """
        state = {}
        for key in module.state_dict():
            name = prefix + key
            tensor = cast(name, self.source.read(name), self.dtype)
            if self.config.num_dummy_heads == 0 and self.source.config.vision.num_dummy_heads:
                tensor = without_dummy_heads(name, tensor, self.config)
            self.writer.write(name, tensor)
            if self.is_run:
                state[key] = tensor.to(self.device, torch.float32)
        if self.is_run:
            module.load_state_dict(state, assign=True)


def _calibrate_layer(
    layer: VisionLayer, prefix: str, hidden: list[torch.Tensor], dtype: torch.dtype
) -> list[LinearReport]:
    """Runs every batch through the layer, in place; returns what entered its linears.

    `dtype` is what the runtime computes in, which must hold what is seen here in float32.
    """
    observer = AmaxObserver(prefix, torch.finfo(dtype).max)
    linears = {name: linear_of(layer, name) for name in VISION_LINEARS}
    observer.watch_inputs(linears)
    for index, batch in enumerate(hidden):
        hidden[index] = layer(batch)
    return [
        LinearReport(prefix + name, amax(linears[name].weight), input_amax)
        for name, input_amax in observer.maxima.items()
    ]


def _write_scales(path: Path, config: VisionConfig, report: list[LinearReport]) -> None:
    with SafetensorsWriter(path, vision_scales(config)) as writer:
        for row in report:
            for kind, value in (
                (WEIGHT_SCALE, row.weight_amax),
                (ACTIVATION_SCALE, row.input_amax),
            ):
                scale = torch.tensor([fp8.scale_from_amax(value)], dtype=torch.float32)
                writer.write(f"{row.linear}.{kind}", scale)
