"""How the encoding of tiles is cut into slices, so that decode steps come between them.

Takes times that somebody measured and knows no GPU. Design: decision 147
(docs/decisions/serving.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Slices:
    """One pass over some tiles, in slices of whole layers."""

    ends: tuple[int, ...]  # layers that are done after each slice but the last
    ms: tuple[float, ...]  # milliseconds of each slice

    @classmethod
    def of(cls, layer_ms: Sequence[float], most_ms: float) -> Slices:
        """Slices of at most `most_ms`, or of one layer that takes longer. layer_ms: the
        milliseconds of each layer, with what comes before the first and after the last."""
        ends, taken = list[int](), 0.0
        for index, ms in enumerate(layer_ms):
            if index > 0 and taken + ms > most_ms:
                ends.append(index)
                taken = 0.0
            taken += ms
        bounds = pairwise([0, *ends, len(layer_ms)])
        return cls(tuple(ends), tuple(sum(layer_ms[begin:end]) for begin, end in bounds))

    def __str__(self) -> str:
        return f"{len(self.ms)} (longest {max(self.ms):.1f} of {sum(self.ms):.1f} ms)"
