"""How the parts of a synthetic engine are opened: the one difference between one GPU and ranks."""

from __future__ import annotations

from typing import Protocol

import torch

from bench.synthetic_engine import decoder_source, vision_source
from runtime.decoder.models.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir
from runtime.vision.executor import VisionExecutor
from runtime.vision.torch_executor import TorchVisionExecutor


class Parts(Protocol):
    """Opens parts where they run; a part has its graphs, if any. device: the leader's."""

    device: torch.device
    num_ranks: int

    def vision(self, engine: EngineDir, precision: str, slice_ms: float = 0.0) -> VisionExecutor:
        """slice_ms: as of `create_vision_executor`. On ranks there are no slices, and the one that
        was opened last encodes."""
        ...

    def decoder(self, engine: EngineDir) -> TorchDecoderExecutor: ...


class OneDevice:
    """`Parts` of one GPU, or of the CPU."""

    num_ranks = 1

    def __init__(self, device: torch.device, *, use_graphs: bool) -> None:
        self.device = device
        self._use_graphs = use_graphs

    def vision(self, engine: EngineDir, precision: str, slice_ms: float = 0.0) -> VisionExecutor:
        executor = load_vision(engine, precision, self.device, slice_ms)
        executor.warm_up()
        return executor

    def decoder(self, engine: EngineDir) -> TorchDecoderExecutor:
        source = decoder_source(engine, self.device)
        opened = open_model(engine, self.device, source, use_graphs=self._use_graphs)
        return TorchDecoderExecutor.over(engine, opened)


def load_vision(
    engine: EngineDir, precision: str, device: torch.device, slice_ms: float = 0.0
) -> TorchVisionExecutor:
    model = engine.vision_checkpoint.load(precision, device, source=vision_source(engine, device))
    max_num_tiles = engine.tiling.max_tiles_per_image
    return TorchVisionExecutor(model, max_num_tiles, slice_ms=slice_ms)
