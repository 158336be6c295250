"""Tiles spread over the ranks' vision executors: data parallel, nothing is encoded twice."""

from __future__ import annotations

from itertools import accumulate

import torch

from runtime.ranks.process_group import ProcessGroup
from runtime.vision.executor import VisionExecutor, check_tiles


def spread(num_tiles: int, num_ranks: int) -> list[int]:
    """Tiles of each rank, the first ranks one more where they do not divide."""
    quotient, remainder = divmod(num_tiles, num_ranks)
    return [quotient + (rank < remainder) for rank in range(num_ranks)]


class ParallelVisionExecutor:
    """`VisionExecutor` of the leader; on a worker its construction is all."""

    def __init__(self, own: VisionExecutor, group: ProcessGroup, image_size: int) -> None:
        self.max_num_tiles = own.max_num_tiles * group.size
        self._own, self._group, self._image_size = own, group, image_size
        group.on("encode", self._encode_part)

    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        check_tiles(tiles, self._image_size)
        counts = spread(len(tiles), self._group.size)
        bounds = list(accumulate(counts, initial=0))
        with self._group.leading("encode", counts):
            self._group.job.phase("vision")
            for rank in range(1, self._group.size):
                if counts[rank]:
                    self._group.send(tiles[bounds[rank] : bounds[rank + 1]], rank)
            embeddings = self._own.encode(tiles[: counts[0]])
            whole = embeddings.new_empty(len(tiles), *embeddings.shape[1:])
            whole[: counts[0]] = embeddings
            for rank in range(1, self._group.size):
                if counts[rank]:
                    self._group.receive(whole[bounds[rank] : bounds[rank + 1]], rank)
            return whole

    def _encode_part(self, counts: list[int]) -> None:
        self._group.job.phase("vision")
        if count := counts[self._group.rank]:
            size = self._image_size
            tiles = self._group.receive(torch.empty(count, size, size, 3, dtype=torch.uint8), 0)
            self._group.send(self._own.encode(tiles), 0)

    def close(self) -> None:
        self._own.close()
