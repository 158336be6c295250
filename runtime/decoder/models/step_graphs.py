"""CUDA graphs of steps, by their size. Elsewhere than on a GPU each is the call that it stands for,
so that the same padding and the same order of rows run everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, order=True)
class StepSize:
    """Rows of a step's graph, padding among them."""

    num_decoding: int  # one row a sequence that decodes
    num_chunk_rows: int = 0  # rows of chunks of prompts, after them


class StepGraphs:
    """All of them share one memory pool: what a graph returns is valid until another one runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._graphs: dict[StepSize, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self, size: StepSize, run: Callable[[], torch.Tensor]) -> None:
        """Keeps what `run` launches. It reads memory that stays where it is. Capture the largest
        size first, so that smaller ones find their memory in the pool."""
        if self._device.type != "cuda":
            return
        run()  # compiles, and lets the libraries allocate
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, vision) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        self._graphs[size] = graph, result

    def run(self, size: StepSize, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Replays the size's graph; where it has none, calls `run`, which computes the same."""
        if size not in self._graphs:
            return run()
        graph, result = self._graphs[size]
        graph.replay()
        return result

    def clear(self) -> None:
        """Waits for the steps in flight and deletes the graphs, which hold the ranks'
        reductions."""
        if self._graphs:
            torch.cuda.synchronize(self._device)
            self._graphs.clear()
            torch.cuda.synchronize(self._device)
