"""A server's metrics, as a monitor reads them."""

from __future__ import annotations

import urllib.request


def samples_at(url: str) -> dict[str, float]:
    """Ours, by series. url: of /metrics."""
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith("nvlm_")]
    return {name: float(value) for name, _, value in lines}
