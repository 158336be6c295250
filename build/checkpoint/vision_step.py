"""Vision part of the conversion: one dtype, no dummy heads, FP8 scales, image embeddings.

Peak memory: one layer in float32, the calibration tiles' hidden states, one tensor of the source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
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
    tiles: torch.Tensor,
    device: torch.device,
) -> VisionStep:
    """Writes `config.json`, `model.safetensors` and, given tiles, `scales.safetensors`.

    tiles: [num_tiles, 3, S, S] float32 of the calibration set, or none of them for no
    calibration. They run through the cast weights in float32, layer by layer.
    """
    config = converted_vision_config(source)
    output_dir.mkdir()
    write_json_atomically(
        output_dir / "config.json",
        {"dtype": dtype_name, "vision": asdict(config), "tiling": asdict(source.config.tiling)},
    )
    tensors = vision_tensors(config, TORCH_DTYPES[dtype_name])
    with SafetensorsWriter(output_dir / "model.safetensors", tensors) as writer:
        loader = _Loader(source, config, TORCH_DTYPES[dtype_name], writer, device)
        with torch.device("meta"):
            model = VisionModel(config)
        loader.fill(model.vision_model.embeddings, "vision_model.embeddings.")
        batches = tiles.split(_TILES_PER_BATCH) if len(tiles) else ()
        hidden = [model.vision_model.embeddings(batch.to(device)) for batch in batches]
        report: list[LinearReport] = []
        for i in tqdm(range(config.num_hidden_layers), "vision layers"):
            with torch.device("meta"):
                layer = VisionLayer(config)
            loader.fill(layer, VISION_LAYER.format(i=i))
            hidden, layer_report = _calibrate_layer(layer, VISION_LAYER.format(i=i), hidden)
            report += layer_report
        loader.fill(model.mlp1, PROJECTOR_PREFIX)
        embeddings = [model.project(batch).cpu() for batch in hidden]
    if report:
        _write_scales(output_dir / "scales.safetensors", config, report)
    none = torch.empty(0, config.tokens_per_tile, config.output_size)
    return VisionStep(torch.cat([none, *embeddings]), report)


@dataclass(frozen=True, slots=True)
class _Loader:
    """Reads, casts and writes the tensors of one module at a time."""

    source: WeightSource
    config: VisionConfig
    dtype: torch.dtype
    writer: SafetensorsWriter
    device: torch.device

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Gives a module on the meta device its weights: the values of `dtype`, as float32."""
        state = {}
        for key in module.state_dict():
            name = prefix + key
            tensor = cast(name, self.source.read(name), self.dtype)
            if self.config.num_dummy_heads == 0 and self.source.config.vision.num_dummy_heads:
                tensor = without_dummy_heads(name, tensor, self.config)
            self.writer.write(name, tensor)
            state[key] = tensor.to(self.device, torch.float32)
        module.load_state_dict(state, assign=True)


def _calibrate_layer(
    layer: VisionLayer, prefix: str, hidden: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[LinearReport]]:
    """Runs the batches through the layer; returns what comes out and what entered its linears."""
    observer = AmaxObserver(prefix)
    linears = {name: linear_of(layer, name) for name in VISION_LINEARS}
    observer.watch_inputs(linears)
    hidden = [layer(batch) for batch in hidden]
    report = [
        LinearReport(prefix + name, amax(linears[name].weight), activation_amax)
        for name, activation_amax in observer.maxima.items()
    ]
    return hidden, report


def _write_scales(path: Path, config: VisionConfig, report: list[LinearReport]) -> None:
    with SafetensorsWriter(path, vision_scales(config)) as writer:
        for row in report:
            for kind, value in (
                (WEIGHT_SCALE, row.weight_amax),
                (ACTIVATION_SCALE, row.input_amax),
            ):
                scale = torch.tensor([fp8.scale_from_amax(value)], dtype=torch.float32)
                writer.write(f"{row.linear}.{kind}", scale)
