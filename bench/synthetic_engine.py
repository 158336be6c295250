"""An engine of random weights and scales, made on the device as the loader asks for each tensor.

It stands in for the 75 GB of the 72B model: the loader, the executor and the scheduler are the
product's, only the file is not there. Scales keep activations near 1 through any number of layers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors, vision_scales, vision_tensors
from nvlm.formats.manifest import Manifest
from nvlm.formats.safetensors_reader import TensorInfo
from nvlm.formats.tensor_names import KV_CACHE_SCALE
from nvlm.formats.vision_checkpoint import VisionCheckpoint
from nvlm.model.config import DecoderConfig, TilingConfig, VisionConfig
from nvlm.model.number_formats import ACTIVATION_SCALE, WEIGHT_SCALE, fp8
from nvlm.planning.limits import EngineLimits
from runtime.engine.engine_dir import EngineDir

_E4M3_DEVIATION = 90.0  # of stored weights: 448 is five of them

DECODERS = {
    "72b": DecoderConfig(8192, 29568, 80, 64, 8, 152064, 32768, 1e6, 1e-6),
    "tiny": DecoderConfig(256, 512, 2, 4, 2, 512, 4096, 1e6, 1e-6),
}
VISIONS = {
    "72b": VisionConfig(3200, 12800, 45, 25, 0, 448, 14, 1e-6, 29568, 8192),
    "tiny": VisionConfig(128, 256, 2, 2, 0, 56, 14, 1e-6, 512, 256),
}


class SyntheticTensors:
    """`TensorSource` of the tensors in `infos`."""

    def __init__(self, infos: dict[str, TensorInfo], device: torch.device, seed: int = 0) -> None:
        self._infos, self._device = infos, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def read(self, name: str) -> torch.Tensor:
        info = self._infos[name]
        if name.endswith((ACTIVATION_SCALE, KV_CACHE_SCALE)):
            return torch.full(info.shape, 5 / fp8.E4M3_MAX)
        if name.endswith(WEIGHT_SCALE):
            columns = self._infos[name.replace(WEIGHT_SCALE, "weight")].shape[1]
            return torch.full(info.shape, 1 / (_E4M3_DEVIATION * math.sqrt(columns)))
        if info.dtype == fp8.E4M3:
            weight = torch.empty(info.shape, dtype=fp8.E4M3, device=self._device)
            for rows in weight.split(8192):
                rows.copy_(fp8.quantize(self._randn(rows.shape), 1 / _E4M3_DEVIATION))
            return weight
        if name.endswith(("ls1", "ls2")):
            return torch.full(info.shape, 0.1, dtype=info.dtype, device=self._device)
        if len(info.shape) == 1 and name.endswith("weight"):
            return torch.ones(info.shape, dtype=info.dtype, device=self._device)  # a norm's
        values = self._randn(info.shape)
        if len(info.shape) > 1 and "vocab_embedding" not in name:
            values /= math.sqrt(math.prod(info.shape[1:]))
        return values.to(info.dtype)

    def _randn(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(
            shape, generator=self._generator, device=self._device, dtype=torch.bfloat16
        )


def synthetic_engine(
    shape: str,
    num_layers: int,
    *,
    max_batch_size: int,
    max_seq_len: int,
    max_num_tokens: int = 8192,
    vision_precision: str = "bfloat16",
    tp_size: int = 1,
    quantize_lm_head: bool = False,
) -> EngineDir:
    decoder = replace(DECODERS[shape], num_hidden_layers=num_layers)
    vision = VISIONS[shape]
    limits = EngineLimits(
        max_batch_size=max_batch_size,
        max_input_len=max_seq_len - 1,
        max_seq_len=max_seq_len,
        max_num_tokens=max_num_tokens,
        max_num_images=1,
        max_multimodal_len=max_batch_size * 7 * vision.tokens_per_tile,
    )
    directory = Path("synthetic")
    return EngineDir(
        directory=directory,
        manifest=Manifest("engine", {}, limits.to_json(), {"decoder": "torch"}, {}),
        limits=limits,
        checkpoint_config=CheckpointConfig(
            decoder, "bfloat16", "FP8", "FP8", tp_size, quantize_lm_head=quantize_lm_head
        ),
        decoder_target="torch",
        vision_checkpoint=VisionCheckpoint(
            directory, "bfloat16", vision, TilingConfig(vision.image_size, 6)
        ),
        vision_executor="torch",
        vision_precision=vision_precision,
    )


def decoder_source(engine: EngineDir, device: torch.device, rank: int = 0) -> SyntheticTensors:
    """A rank's shards; what is whole on every rank is the same there."""
    return SyntheticTensors(decoder_tensors(engine.checkpoint_config, rank), device)


def vision_source(engine: EngineDir, device: torch.device) -> SyntheticTensors:
    config = engine.vision_config
    infos = vision_tensors(config, torch.bfloat16) | vision_scales(config)
    return SyntheticTensors(infos, device)
