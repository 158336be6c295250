"""`VisionExecutor` on PyTorch, in the precision the engine was built for."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from nvlm.inputs.tiling import normalize
from nvlm.model.vision import VisionModel
from nvlm.planning import hopper
from runtime.vision.executor import check_tiles
from runtime.vision.slices import Slices

if TYPE_CHECKING:
    from runtime.vision.hopper_model import HopperVisionModel

log = logging.getLogger(__name__)

_FIRST_LAYERS = 1
"""Layers of the first graph: enough to keep a GPU busy while the host launches the other."""


class TorchVisionExecutor:
    """On a Hopper GPU in a 16-bit type or FP8 by hopper_model.py, with CUDA graphs for each number
    of tiles; elsewhere by the module itself, the oracle.

    slice_ms: with graphs, `encode` launches slices of at most so many milliseconds and waits for
    each before the next. What other threads launch on the same stream comes between. 0: no slices.
    """

    def __init__(
        self,
        model: VisionModel,
        max_num_tiles: int,
        *,
        use_graphs: bool = True,
        slice_ms: float = 0.0,
    ) -> None:
        self.max_num_tiles = max_num_tiles
        patch = model.vision_model.embeddings.patch_embedding
        self._image_size = model.patches_per_side * patch.kernel_size[0]
        self._device, self._dtype = patch.weight.device, patch.weight.dtype
        self._model = model
        self._fast: HopperVisionModel | None = None
        self._graphs: dict[int, _Graphs] | None = None
        self._slice_ms = slice_ms
        if self._dtype != torch.float32 and hopper.has_kernels(self._device):
            from runtime.vision.hopper_model import HopperVisionModel
            from runtime.vision.kernels.triton_forms import TritonForms

            self._fast = HopperVisionModel(model, TritonForms(self._device))
            self._pool = torch.cuda.graph_pool_handle()
            self._graphs = {} if use_graphs else None
            # Sleeps instead of spinning: a wait takes as long as a slice and a step.
            self._is_done = torch.cuda.Event(blocking=True) if slice_ms else None

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
        if self._slice_ms:
            log.info(
                "vision is encoded in slices of at most %g ms, between decode steps: %s",
                self._slice_ms,
                ", ".join(f"{n} tiles in {each.slices}" for n, each in self._graphs.items()),
            )

    def close(self) -> None:
        """Nothing is held beyond memory."""

    def _encode(self, tiles: torch.Tensor) -> torch.Tensor:
        if self._fast is None:
            return self._model(normalize(tiles.to(self._device)).to(self._dtype))
        if self._graphs is None:
            return self._fast(tiles.to(self._device))
        if len(tiles) not in self._graphs:
            example = tiles.to(self._device)
            self._graphs[len(tiles)] = _Graphs(self._fast, example, self._pool, self._slice_ms)
        return self._graphs[len(tiles)](tiles, self._is_done)


class _Graphs:
    """`model` for as many tiles as `example` has, in a graph for each slice. Without slices there
    are two: while the GPU runs the short one, the host launches the other.

    Graphs of one `pool` share their memory, and a graph reads what the one before it left there:
    all run in the order of their capture, and each result is copied out before others run."""

    def __init__(
        self, model: HopperVisionModel, example: torch.Tensor, pool: Any, slice_ms: float
    ) -> None:
        self._tiles = example.clone()
        model(self._tiles)  # compiles, and lets the libraries allocate
        self.slices: Slices | None = None
        ends: tuple[int, ...] = (_FIRST_LAYERS,) if model.num_layers > _FIRST_LAYERS else ()
        if slice_ms:
            self.slices = Slices.of(_layer_ms(model, self._tiles), slice_ms)
            ends = self.slices.ends
        torch.cuda.synchronize()
        self._graphs = [torch.cuda.CUDAGraph() for _ in range(len(ends) + 1)]
        slices = model.in_slices(self._tiles, ends)
        for graph in self._graphs:
            # The decoder's thread may allocate meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._embeddings = next(slices)  # the last one's

        # From pinned memory nobody waits for the copy.
        self._host = torch.empty_like(self._tiles, device="cpu", pin_memory=True)
        self._is_copied = torch.cuda.Event()

    def __call__(self, tiles: torch.Tensor, is_done: torch.cuda.Event | None) -> torch.Tensor:
        """is_done: waited for before each graph, and recorded after it; None: no slices."""
        self._is_copied.synchronize()  # of the call before
        # By one thread: others sleep, and take longer to wake than the copy does.
        self._host.numpy()[:] = tiles.numpy()
        self._tiles.copy_(self._host, non_blocking=True)
        self._is_copied.record()
        for graph in self._graphs:
            if is_done is not None:
                is_done.synchronize()  # of the slice before; releases Python's lock
            graph.replay()
            if is_done is not None:
                is_done.record()
        return self._embeddings.clone()


def _layer_ms(model: HopperVisionModel, tiles: torch.Tensor) -> list[float]:
    """Milliseconds of each layer, launch by launch; the first with the embedding, the last with
    the projector."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(model.num_layers + 1)]
    events[0].record()
    layers = model.in_slices(tiles, range(1, model.num_layers))
    for event, _ in zip(events[1:], layers, strict=True):
        event.record()
    events[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(events)]
