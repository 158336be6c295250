"""`VisionExecutor` on PyTorch, in the precision the engine was built for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nvlm.inputs.tiling import normalize
from nvlm.model.vision import VisionModel
from nvlm.planning import hopper
from runtime.vision.executor import check_tiles

if TYPE_CHECKING:
    from runtime.vision.hopper_model import HopperVisionModel


class TorchVisionExecutor:
    """On a Hopper GPU in a 16-bit type or FP8 by hopper_model.py, with CUDA graphs for each number
    of tiles; elsewhere by the module itself, the oracle."""

    def __init__(self, model: VisionModel, max_num_tiles: int, *, use_graphs: bool = True) -> None:
        self.max_num_tiles = max_num_tiles
        patch = model.vision_model.embeddings.patch_embedding
        self._image_size = model.patches_per_side * patch.kernel_size[0]
        self._device, self._dtype = patch.weight.device, patch.weight.dtype
        self._model = model
        self._fast: HopperVisionModel | None = None
        self._graphs: dict[int, _Graph] | None = None
        if self._dtype != torch.float32 and hopper.has_kernels(self._device):
            from runtime.vision.hopper_model import HopperVisionModel
            from runtime.vision.kernels.triton_forms import TritonForms

            self._fast = HopperVisionModel(model, TritonForms(self._device))
            self._pool = torch.cuda.graph_pool_handle()
            self._graphs = {} if use_graphs else None

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        check_tiles(tiles, self._image_size)
        batches = tiles.contiguous().split(self.max_num_tiles)
        return torch.cat([self._encode(batch) for batch in batches])

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Captures the graphs, so that neither compiling nor running out of memory is left to a
        request. Largest first: the others find their memory in its pool."""
        if self._graphs is None:
            return
        for num_tiles in range(self.max_num_tiles, 0, -1):
            size = self._image_size
            blank = torch.zeros(num_tiles, size, size, 3, dtype=torch.uint8)
            self._encode(blank)

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        if self._fast is None:
            return self._model(normalize(tiles.to(self._device)).to(self._dtype))
        if self._graphs is None:
            return self._fast(tiles.to(self._device))
        if len(tiles) not in self._graphs:
            self._graphs[len(tiles)] = _Graph(self._fast, tiles.to(self._device), self._pool)
        return self._graphs[len(tiles)](tiles)


class _Graph:
    """`model` for as many tiles as `example` has, in two graphs: while the GPU runs the short one,
    the host launches the other. Graphs of one `pool` share their memory: each result is copied out
    before another runs."""

    def __init__(self, model: HopperVisionModel, example: torch.Tensor, pool: Any) -> None:
        self._tiles = example.clone()
        model(self._tiles)  # compiles, and lets the libraries allocate
        torch.cuda.synchronize()
        self._begin, self._finish = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # The decoder's thread may allocate meanwhile.
        options = {"pool": pool, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._begin, **options):
            state = model.begin(self._tiles)
        with torch.cuda.graph(self._finish, **options):
            self._embeddings = model.finish(*state)

        # From pinned memory nobody waits for the copy.
        self._host = torch.empty_like(self._tiles, device="cpu", pin_memory=True)
        self._is_copied = torch.cuda.Event()

    def __call__(self, tiles: torch.Tensor) -> torch.Tensor:
        self._is_copied.synchronize()  # of the call before
        # By one thread: others sleep, and take longer to wake than the copy does.
        self._host.numpy()[:] = tiles.numpy()
        self._tiles.copy_(self._host, non_blocking=True)
        self._is_copied.record()
        self._begin.replay()
        self._finish.replay()
        return self._embeddings.clone()
