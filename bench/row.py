"""One measured phase beside the ceiling that binds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """ms: the median step's or pass's. rate: bytes a second of a decode step, else floating-point
    operations; share: of the ceiling. num_tokens: context, prompt, or positions of all tiles."""

    phase: str
    num_layers: int
    batch_size: int
    num_tokens: int
    ms: float
    tokens_per_s: float
    rate: float
    share: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        is_decode = self.phase.startswith("decode")
        unit, rate = ("GB/s", self.rate / 1e9) if is_decode else ("TFLOP/s", self.rate / 1e12)
        return (
            f"{self.phase:<16}{self.num_layers:>3} layers, batch {self.batch_size:<3} "
            f"{self.num_tokens:>5} tokens {self.ms:9.3f} ms {self.tokens_per_s:10.1f} tokens/s "
            f"{rate:8.1f} {unit} ({self.share:.1%})"
        )
