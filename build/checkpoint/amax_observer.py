"""Records the largest magnitude that enters each linear while calibration samples run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from build.checkpoint.cast import amax


class AmaxObserver:
    """Running maxima by name, over everything seen."""

    def __init__(self) -> None:
        self.maxima: dict[str, float] = {}

    def see(self, name: str, x: torch.Tensor) -> None:
        self.maxima[name] = max(self.maxima.get(name, 0.0), amax(x))

    def watch_inputs(self, modules: Mapping[str, nn.Module]) -> None:
        """Records what enters each module, under its name, from now on."""
        for name, module in modules.items():

            def see(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                self.see(name, inputs[0])

            module.register_forward_pre_hook(see)
