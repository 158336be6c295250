"""Records what enters each linear while calibration samples run: largest magnitude, some rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from build.conversion.quantization.cast import amax
from nvlm.program.errors import UserError

NUM_KEPT_ROWS = 64


class AmaxObserver:
    """Running maxima by name over everything seen, and `NUM_KEPT_ROWS` rows spread over it.

    `prefix` completes names in messages; what exceeds `limit`, or is no number, is refused.
    `num_rows` is how many rows each linear will see in all.
    """

    def __init__(self, prefix: str, limit: float, num_rows: int) -> None:
        self.maxima: dict[str, float] = {}
        self.head_maxima: dict[str, torch.Tensor] = {}
        self._prefix = prefix
        self._limit = limit
        self._stride = max(1, num_rows // NUM_KEPT_ROWS)
        self._seen: dict[str, int] = {}
        self._kept: dict[str, list[torch.Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def see_heads(self, name: str, x: torch.Tensor) -> None:
        """x: [rows, heads, head_dim]; also keeps each head's largest magnitude."""
        self.see(name, x)
        heads = x.abs().amax((0, 2)).to(torch.float32)
        before = self.head_maxima.get(name, heads)
        self.head_maxima[name] = torch.maximum(before, heads)

    def see_input(self, name: str, rows: torch.Tensor) -> None:
        """rows: [rows, in_features] of what enters a linear."""
        self.see(name, rows)
        self._keep(name, rows)

    def see(self, name: str, x: torch.Tensor) -> None:
        value = amax(x)
        if not value <= self._limit:  # NaN too
            raise UserError(
                f"calibration overflows --dtype at {self._prefix}{name} ({value}); use --dtype "
                "bfloat16 or float32"
            )
        self.maxima[name] = max(self.maxima.get(name, 0.0), value)

    def rows(self, name: str) -> torch.Tensor:
        """[up to NUM_KEPT_ROWS + 1, in_features] of what entered a linear, in its own dtype."""
        return torch.cat(self._kept[name])

    def watch_inputs(self, modules: Mapping[str, nn.Module]) -> None:
        """Records what enters each module, under its name, until `stop`."""
        for name, module in modules.items():

            def see(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                self.see_input(name, inputs[0].flatten(0, -2))

            self._handles.append(module.register_forward_pre_hook(see))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str, rows: torch.Tensor) -> None:
        seen = self._seen.get(name, 0)
        self._seen[name] = seen + len(rows)
        kept = rows[-seen % self._stride :: self._stride].clone()
        self._kept.setdefault(name, []).append(kept)
