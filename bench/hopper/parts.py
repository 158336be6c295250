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

    def vision(self, engine: EngineDir, precision: str) -> VisionExecutor:
        """On ranks the one that was opened last encodes."""
        ...

    def decoder(self, engine: EngineDir) -> TorchDecoderExecutor: ...


class OneDevice:
    """`Parts` of one GPU, or of the CPU."""

    num_ranks = 1

    def __init__(self, device: torch.device, *, use_graphs: bool) -> None:
        self.device = device
        self._use_graphs = use_graphs

    def vision(self, engine: EngineDir, precision: str) -> VisionExecutor:
        executor = load_vision(engine, precision, self.device)
        executor.warm_up()
        return executor

    def decoder(self, engine: EngineDir) -> TorchDecoderExecutor:
        source = decoder_source(engine, self.device)
        opened = open_model(engine, self.device, source, use_graphs=self._use_graphs)
        return TorchDecoderExecutor.over(engine, opened)


def load_vision(engine: EngineDir, precision: str, device: torch.device) -> TorchVisionExecutor:
    model = engine.vision_checkpoint.load(precision, device, source=vision_source(engine, device))
    return TorchVisionExecutor(model, engine.tiling.max_tiles_per_image)
