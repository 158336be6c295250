"""What an unknown name may have meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], other_words: Mapping[str, str] | None = None) -> str:
    """ "; did you mean 'X'?", or nothing. other_words: what another program calls a known name."""
    other = (other_words or {}).get(name)
    matches = [other] if other else get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.7)
    return f"; did you mean {matches[0]!r}?" if matches else ""
