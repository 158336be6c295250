"""Records the largest magnitude that enters each linear while calibration samples run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from build.checkpoint.cast import amax
from nvlm.errors import UserError


class AmaxObserver:
    """Running maxima by name, over everything seen.

    `prefix` completes names in messages; what exceeds `limit`, or is no number, is refused.
    """

    def __init__(self, prefix: str, limit: float) -> None:
        self.maxima: dict[str, float] = {}
        self._prefix = prefix
        self._limit = limit

    def see(self, name: str, x: torch.Tensor) -> None:
        value = amax(x)
        if not value <= self._limit:  # NaN too
            raise UserError(
                f"calibration overflows --dtype at {self._prefix}{name} ({value}); use --dtype "
                "bfloat16 or float32"
            )
        self.maxima[name] = max(self.maxima.get(name, 0.0), value)

    def watch_inputs(self, modules: Mapping[str, nn.Module]) -> None:
        """Records what enters each module, under its name, from now on."""
        for name, module in modules.items():

            def see(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                self.see(name, inputs[0])

            module.register_forward_pre_hook(see)
