"""`VisionExecutor` on PyTorch, in the precision the engine was built for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nvlm.vision_model import VisionModel
from runtime.kernels import hopper
from runtime.vision.executor import check_tiles

Encode = Callable[[torch.Tensor], torch.Tensor]


class TorchVisionExecutor:
    """On a Hopper GPU in a 16-bit type or FP8 by hopper_model.py, one CUDA graph for each number
    of tiles that has come; elsewhere by the module itself, the oracle."""

    def __init__(self, model: VisionModel, max_num_tiles: int, *, use_graphs: bool = True) -> None:
        self.max_num_tiles = max_num_tiles
        patch = model.vision_model.embeddings.patch_embedding
        self._image_size = model.patches_per_side * patch.kernel_size[0]
        self._device, self._dtype = patch.weight.device, patch.weight.dtype
        self._model: Encode = model
        self._graphs: dict[int, _Graph] | None = None
        if self._dtype != torch.float32 and hopper.has_kernels(self._device):
            from runtime.vision.hopper_model import HopperVisionModel
            from runtime.vision.kernels.triton_forms import TritonForms

            self._model = HopperVisionModel(model, TritonForms(self._device))
            self._pool = torch.cuda.graph_pool_handle()
            self._graphs = {} if use_graphs else None

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        check_tiles(tiles, self._image_size)
        return torch.cat([self._encode(batch) for batch in tiles.split(self.max_num_tiles)])

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        if self._graphs is None:
            return self._model(tiles.to(self._device, self._dtype))
        if len(tiles) not in self._graphs:
            example = tiles.to(self._device, self._dtype)
            self._graphs[len(tiles)] = _Graph(self._model, example, self._pool)
        return self._graphs[len(tiles)](tiles)


class _Graph:
    """`encode` for as many tiles as `example` has. Graphs of one `pool` share their memory: each
    result is copied out before another runs."""

    def __init__(self, encode: Encode, example: torch.Tensor, pool: Any) -> None:
        self._tiles = example.clone()
        encode(self._tiles)  # compiles, and lets the libraries allocate
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # The decoder's thread may allocate meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._embeddings = encode(self._tiles)

        # Rounded on the host, half the bytes cross, and from pinned memory nobody waits for them.
        self._host = torch.empty_like(self._tiles, device="cpu", pin_memory=True)
        self._is_copied = torch.cuda.Event()

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        if tiles.device.type == "cpu":
            self._is_copied.synchronize()  # of the call before
            tiles = self._host.copy_(tiles)
        self._tiles.copy_(tiles, non_blocking=True)
        self._is_copied.record()
        self._graph.replay()
        return self._embeddings.clone()
