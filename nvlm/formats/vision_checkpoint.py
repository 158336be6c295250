"""The `vision/` folder of a checkpoint directory, and the module it makes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvlm.formats import layout
from nvlm.formats.checkpoint_tensors import (
    open_checked,
    vision_linears,
    vision_scales,
    vision_tensors,
)
from nvlm.formats.safetensors_reader import TensorSource
from nvlm.formats.tensor_copies import copies_of
from nvlm.model.config import MOST_SIZE, MOST_TILES, TilingConfig, VisionConfig
from nvlm.model.dtypes import TORCH_DTYPES
from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import UNQUANTIZED, LinearScales, NumberFormat, format_named
from nvlm.model.vision import VisionModel, linear_of
from nvlm.program.errors import UserError
from nvlm.program.json_files import StrictReader, read_json_object


@dataclass(frozen=True, slots=True)
class VisionCheckpoint:
    """What `vision/config.json` says, beside the folder it stands in."""

    directory: Path  # `vision/`, which holds weights and scales
    dtype: str  # torch's name of the weights' type
    config: VisionConfig  # shape of ViT and projector
    tiling: TilingConfig  # how the model was trained to see images

    @classmethod
    def read(cls, directory: Path) -> VisionCheckpoint:
        path = directory / layout.CONFIG
        reader = StrictReader(read_json_object(path), path)
        dtype = reader.one_of("dtype", tuple(TORCH_DTYPES))
        config = _vision_config(reader.section("vision"))
        tiling = reader.section("tiling").only("image_size", "max_num_tiles")
        tiling.one_of("image_size", (config.image_size,))
        most_tiles = tiling.bounded_int("max_num_tiles", MOST_TILES)
        return cls(directory, dtype, config, TilingConfig(config.image_size, most_tiles))

    @property
    def has_scales(self) -> bool:
        return (self.directory / layout.SCALES).is_file()

    def dtype_around(self, precision: str) -> str:
        """The type of what is not quantised in `precision`, a dtype name or a number format's."""
        return precision if format_named(precision) is UNQUANTIZED else self.dtype

    def load(
        self,
        precision: str,
        device: torch.device,
        *,
        widen: bool = True,
        source: TensorSource | None = None,
    ) -> VisionModel:
        """The model in `precision`: a dtype name, or the number format of each layer's linears.

        source: of weights and scales, by default the folder's files.

        On a CPU narrow types are computed in float32 and rounded, which is both what the numerics
        contract says and faster than the CPU's own bfloat16: weights are widened at each use, or
        with `widen` once for all.
        """
        number_format, dtype = format_named(precision), self.dtype_around(precision)
        scales = self.read_scales(number_format, source)
        model = self._load(dtype, device, source, number_format, scales)
        for name, found in scales.items():
            module = linear_of(model, name)
            quantised = QuantizableLinear(
                module.weight, module.bias, number_format=number_format, scales=found
            )
            model.set_submodule(name, quantised)
        if device.type == "cpu" and dtype != "float32":
            _compute_in_float32(model, widen)
        return model.requires_grad_(False).eval()

    def load_plain(
        self, dtype: str, device: torch.device, source: TensorSource | None = None
    ) -> VisionModel:
        """The module as torch computes it in `dtype`, nothing quantised."""
        return self._load(dtype, device, source, UNQUANTIZED, {})

    def read_scales(
        self, number_format: NumberFormat, source: TensorSource | None = None
    ) -> dict[str, LinearScales]:
        """The scales of every linear that is quantised, by full name."""
        if not number_format.scale_shapes:
            return {}
        if source is None and not self.has_scales:
            raise UserError(
                f"{self.directory} has no {layout.SCALES}, which {number_format.name} vision "
                f"needs; convert with --quant_algo {number_format.name} or choose another "
                "--vision_precision"
            )
        reader = source or open_checked(self.directory / layout.SCALES, vision_scales(self.config))
        found = {
            name: number_format.read_scales(reader.read, name)
            for name in vision_linears(self.config)
        }
        return {name: scales for name, scales in found.items() if scales is not None}

    def _load(
        self,
        dtype: str,
        device: torch.device,
        source: TensorSource | None,
        number_format: NumberFormat,
        scales: dict[str, LinearScales],
    ) -> VisionModel:
        """Weights of linears that have scales are quantised, each from when it was read."""
        stored = vision_tensors(self.config, TORCH_DTYPES[self.dtype])
        reader = source or open_checked(self.directory / layout.WEIGHTS, stored)
        copies, wanted = copies_of(reader, device), TORCH_DTYPES[dtype]

        def read(name: str) -> torch.Tensor:
            tensor = copies.read(name)
            found = scales.get(name.removesuffix(".weight"))
            if found is not None or tensor.dtype != wanted:
                copies.wait()
                tensor = tensor.to(wanted)
            return tensor if found is None else number_format.quantize(tensor, found.weight)

        with torch.device("meta"):
            model = VisionModel(self.config)
        with copies:
            weights = {name: read(name) for name in stored}
        model.load_state_dict(weights, assign=True)
        return model


def _vision_config(reader: StrictReader) -> VisionConfig:
    """As the converter wrote it. Raises `UserError` for what no model has."""
    eps = ("norm_eps", "projector_norm_eps")
    sizes = [field.name for field in fields(VisionConfig) if field.name not in eps]
    reader.only(*sizes, *eps)
    values: dict[str, Any] = {
        name: reader.bounded_int(name, MOST_SIZE, 0 if name == "num_dummy_heads" else 1)
        for name in sizes
    }
    reader.require_multiple("hidden_size", 1, "num_attention_heads")
    reader.require_multiple("image_size", 2, "patch_size")  # the pixel shuffle merges 2 x 2
    values |= {name: reader.positive_float(name) for name in eps}
    return VisionConfig(**values)


def _compute_in_float32(model: VisionModel, widen: bool) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            linear = QuantizableLinear(module.weight, module.bias)
            model.set_submodule(name, linear)
    for module in model.modules():
        if widen and isinstance(module, QuantizableLinear):
            module.widen()
