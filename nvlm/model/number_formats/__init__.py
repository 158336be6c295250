"""What a linear's weight is stored as and multiplied in: one file a number format.

Another format is a file here and a line of `QUANTIZED`. Kernels that are fast in it are the
runtime's matter, and what compiles for it is a target's.
"""

from __future__ import annotations

from nvlm.model.number_formats.fp8 import FP8
from nvlm.model.number_formats.number_format import (
    ACTIVATION_SCALE,
    WEIGHT_SCALE,
    LinearScales,
    NumberFormat,
)
from nvlm.model.number_formats.unquantized import UNQUANTIZED

__all__ = [
    "ACTIVATION_SCALE",
    "FP8",
    "QUANTIZED",
    "UNQUANTIZED",
    "WEIGHT_SCALE",
    "LinearScales",
    "NumberFormat",
    "format_named",
]

QUANTIZED: dict[str, NumberFormat] = {each.name: each for each in (FP8,)}
"""By the name in config.json (`quant_algo`), on the command line and in an engine."""


def format_named(name: str | None) -> NumberFormat:
    """The format that `quant_algo` or a precision names; None and dtype names are unquantised."""
    return UNQUANTIZED if name is None else QUANTIZED.get(name, UNQUANTIZED)
