"""Work beside other work: a stream that leaves the current one and joins it again, in a CUDA graph
and outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """Elsewhere than on a GPU the work is done in place."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is launched inside runs after what was launched before, beside what comes next.
        Memory that is allocated inside must not be used after `join`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched next comes after both."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
