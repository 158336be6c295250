"""Oracle of FP8 rounding: e4m3fn from its bit definition, in numpy, by table search.

In and out: numpy arrays of any shape; codes are bytes (uint8). No torch float8 type is used.
Bits s eeee mmm, exponent bias 7, no infinity, 0x7f and 0xff are NaN, largest finite value 448
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning", table 1). By the numerics contract
values are always clamped before the cast.
"""

import numpy as np

MAX = 448.0


def _decode(code: int) -> float:
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9  # subnormal: (mantissa / 8) * 2**(1 - 7)
    return sign * (8 + mantissa) * 2.0 ** (exponent - 10)


TABLE = np.array([_decode(code) for code in range(256)], dtype=np.float64)  # [256]
_MAGNITUDES = TABLE[:127]  # codes 0..126 in increasing order, 0 to 448
_MIDPOINTS = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2  # exact: two more bits than e4m3


def quantize(x: np.ndarray, scale: float) -> np.ndarray:
    """Codes (uint8, shape of x) of clamp(x / scale, +-448), to nearest, ties to even.

    The division and the clamp are float32, as on the device; what follows is exact.
    """
    scaled = np.asarray(x, dtype=np.float32) / np.float32(scale)
    magnitude = np.abs(np.clip(scaled, np.float32(-MAX), np.float32(MAX))).astype(np.float64)
    below = np.searchsorted(_MIDPOINTS, magnitude, side="left")  # on a tie: the smaller code
    above = np.searchsorted(_MIDPOINTS, magnitude, side="right")  # on a tie: the larger code
    code = np.where(below % 2 == 0, below, above).astype(np.uint8)
    code = np.where(np.isnan(magnitude), np.uint8(0x7F), code)
    return code | (np.signbit(scaled).astype(np.uint8) << 7)


def linear_scale(amax: float, dtype: str) -> float:
    """amax / 448 in float32, then the smallest number of `dtype` that is not below it."""
    exact = np.float32(amax) / np.float32(MAX)
    if dtype == "bfloat16":  # the upper half of a float32's bits
        bits = (exact.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
        return float(bits.view(np.float32))
    nearest = exact.astype(dtype)
    above = np.nextafter(nearest, np.array(np.inf, dtype))
    return float(nearest if nearest.astype(np.float32) >= exact else above)


def dequantize(codes: np.ndarray, scale: float) -> np.ndarray:
    """float64 real values of codes (uint8, any shape): stored value times the float32 scale."""
    return TABLE[codes] * float(np.float32(scale))
