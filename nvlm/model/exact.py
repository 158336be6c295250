"""Division that refuses a remainder."""

from __future__ import annotations


def exact_div(dividend: int, divisor: int) -> int:
    """`dividend / divisor` where a remainder would be a bug (heads per rank, patches per side)."""
    quotient, remainder = divmod(dividend, divisor)
    assert remainder == 0, f"{dividend} is not a multiple of {divisor}"
    return quotient
