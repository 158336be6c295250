"""English words of 3 to 8 letters, split once and for all into training and held-out words.

words.txt is drawn from SCOWL's small American list (docs/tiny_model.md names the licence): lower
case, letters only. The split hangs on each word's own hash, so it never moves.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("words.txt")
_HELD_OUT_SHARE = 10  # one word in ten


def _is_held_out(word: str) -> bool:
    return hashlib.sha256(word.encode()).digest()[0] % _HELD_OUT_SHARE == 0


@cache
def training_words() -> tuple[str, ...]:
    return tuple(word for word in _FILE.read_text().split() if not _is_held_out(word))


@cache
def held_out_words() -> tuple[str, ...]:
    """Never drawn as words in training; random letters or a longer word cut short may spell one."""
    return tuple(word for word in _FILE.read_text().split() if _is_held_out(word))
