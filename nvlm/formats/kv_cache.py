"""How an engine holds keys and values, where that is not as its checkpoint says.

A section `kv_cache` of the engine's decoder configuration; an engine without one is as its
checkpoint. Decision 141 (docs/decisions/engines.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nvlm.program.json_files import StrictReader

SECTION = "kv_cache"
_FP8, _IN_DTYPE = "fp8", "unquantized"


@dataclass(frozen=True, slots=True)
class EngineKVCache:
    """What an engine holds keys and values in, where it is not as its checkpoint says."""

    in_dtype: bool = False  # they stay in the checkpoint's dtype, whatever scales it has
    # Of every layer one of K and one of V, instead of the checkpoint's one of both.
    scales: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What is added to the engine's configuration."""
        if self == AS_STORED:
            return {}
        scales = {"scales": [list(pair) for pair in self.scales]} if self.scales else {}
        return {SECTION: {"format": _IN_DTYPE if self.in_dtype else _FP8, **scales}}

    @classmethod
    def from_json(cls, reader: StrictReader, num_layers: int) -> EngineKVCache:
        """reader: of the engine's configuration. Raises `UserError` for what no build wrote."""
        if SECTION not in reader.values:
            return AS_STORED
        section = reader.section(SECTION)
        in_dtype = section.one_of("format", (_FP8, _IN_DTYPE)) == _IN_DTYPE
        found = section.values.get("scales", [])
        expected = [0] if in_dtype else [0, num_layers]
        if (
            not isinstance(found, list)
            or len(found) not in expected
            or not all(_is_pair_of_scales(pair) for pair in found)
        ):
            raise section.unsupported(
                "scales", f"a scale of K and one of V for {num_layers} layers"
            )
        return cls(in_dtype, tuple((float(k), float(v)) for k, v in found))


def _is_pair_of_scales(pair: Any) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(x) in (int, float) and x > 0 and math.isfinite(x) for x in pair)
    )


AS_STORED = EngineKVCache()
