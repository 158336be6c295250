"""The embeddings of pictures that were encoded before, in host memory.

A conversation shows its pictures again with every turn. Those of the turns before need no vision.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

MAX_BYTES = 1 << 30
"""36 pictures of seven tiles at the 72B model's size."""


class EncodedPictures:
    """Rows of prompt tables by their picture's cache key, for one thread at a time. Of more than
    `max_bytes` the picture asked for longest ago goes first."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._num_bytes = 0

    def get(self, key: bytes) -> torch.Tensor | None:
        """[num_rows, hidden_size] in host memory."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: bytes, rows: torch.Tensor) -> None:
        """Copies `rows`. From a GPU the copy is only launched, on the current stream: whoever gets
        it must have waited for that."""
        if key in self._rows or rows.nbytes > self._max_bytes:
            return
        self._num_bytes += rows.nbytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._rows.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        copy = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=rows.is_cuda)
        self._rows[key] = copy.copy_(rows, non_blocking=True)
