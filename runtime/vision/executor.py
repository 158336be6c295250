"""What encodes tiles, seen from outside. Implementations share one contract test."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch

from nvlm.formats import layout
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.memory_plan import may_widen, vision_parameter_count
from nvlm.planning.tensorrt_package import PACKAGES, load_tensorrt
from nvlm.program import startup
from nvlm.program.errors import UserError
from runtime.engine.engine_dir import EngineDir
from runtime.engine.loading import loading_on


class VisionExecutor(Protocol):
    max_num_tiles: int
    """Tiles that one pass takes; `encode` splits what exceeds it."""

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """tiles [num_tiles, S, S, 3] uint8 RGB on the CPU, num_tiles >= 1 ->
        image embeddings [num_tiles, tokens_per_tile, hidden_size] on the executor's device."""
        ...

    def close(self) -> None: ...


def create_vision_executor(
    engine: EngineDir, device: torch.device, slice_ms: float = 0.0, *, use_graphs: bool = True
) -> VisionExecutor:
    """The executor the engine was built for; heavy imports happen in the chosen branch only.

    slice_ms: on a GPU, `encode` waits after each slice of at most so many milliseconds, so that
    what other threads launch comes between; 0 is no slices. On a CPU there are none. use_graphs:
    of torch's, for every number of tiles; False suits who encodes once."""
    max_num_tiles = engine.tiling.max_tiles_per_image
    if engine.vision_executor == "onnxruntime":
        if importlib.util.find_spec("onnxruntime") is None:
            raise UserError(
                f"{engine.directory} was built for ONNX Runtime, which is not installed; pip "
                "install onnxruntime or build the engine with --vision torch"
            )
        from runtime.vision.onnxruntime_executor import OnnxRuntimeVisionExecutor

        path = engine.vision_checkpoint.directory / layout.GRAPH
        with startup.phase("vision"):
            return OnnxRuntimeVisionExecutor(path, max_num_tiles)
    if engine.vision_executor == "torch":
        from runtime.vision.torch_executor import TorchVisionExecutor

        num_parameters = vision_parameter_count(engine.vision_config)
        widen = may_widen(num_parameters, device, total_memory_bytes(device))
        with loading_on(device, engine):
            with startup.phase("vision weights"):
                model = engine.vision_checkpoint.load(engine.vision_precision, device, widen=widen)
            with startup.phase("vision kernels and graphs"):
                executor = TorchVisionExecutor(
                    model, max_num_tiles, use_graphs=use_graphs, slice_ms=slice_ms
                )
                executor.warm_up()
        return executor
    if engine.vision_executor in PACKAGES:
        from runtime.vision.tensorrt_executor import TensorrtVisionExecutor

        package = load_tensorrt(engine.vision_executor)
        with startup.phase("vision"):
            return TensorrtVisionExecutor(
                package,
                engine.vision_checkpoint.directory / layout.ENGINE,
                device,
                in_slices=slice_ms > 0.0,
            )
    raise UserError(
        f"{engine.directory} was built for vision executor {engine.vision_executor!r}, which this "
        "version does not run; build it again with --vision onnxruntime or torch"
    )


def check_tiles(tiles: torch.Tensor, image_size: int) -> None:
    """Refuses tiles of another shape than the model was trained on, and what are no pixels."""
    expected = (image_size, image_size, 3)
    if tiles.ndim != 4 or tuple(tiles.shape[1:]) != expected or len(tiles) == 0:
        raise UserError(
            f"tiles have shape {list(tiles.shape)}, expected [1 or more, {image_size}, "
            f"{image_size}, 3]"
        )
    if tiles.dtype != torch.uint8:
        raise UserError(f"tiles are {tiles.dtype}, expected torch.uint8: RGB pixels")
