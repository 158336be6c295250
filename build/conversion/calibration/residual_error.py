"""What each quantised part of a layer, alone, does to the layer's output.

A few rows of the calibration data run through the layer in float32: once as it is, once with each
part quantised. An error in one linear may be damped or multiplied by what comes after it, and it
is added to a residual stream that may be large or small beside it; this measures all of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from nvlm.model.linear import QuantizableLinear
from nvlm.model.number_formats import LinearScales, NumberFormat

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class QuantisedLinears:
    """A layer's linears, by name, and how each would be stored."""

    linears: Mapping[str, nn.Linear | QuantizableLinear]  # by name in the layer
    scales: Mapping[str, LinearScales]  # by the same names
    number_format: NumberFormat  # what they are stored in

    def quantised(self, name: str) -> QuantizableLinear:
        return QuantizableLinear.quantised(
            self.linears[name], self.number_format, self.scales[name]
        )


def residual_errors(
    run: Run, parts: QuantisedLinears, others: Mapping[str, Run]
) -> dict[str, float]:
    """Relative 2-norms of the layer's output, by linear and by the names of `others`.

    `run` gives the layer's output for the rows; `others` give it with something else quantised.
    Peak memory: what `run` takes, and one linear's stored weight.
    """
    with ExitStack() as stack:
        for linear in parts.linears.values():
            stack.enter_context(_remembering(linear))
        expected = run()

        def error(found: torch.Tensor) -> float:
            difference = (found - expected).to(torch.float64).norm()
            return float(difference / expected.to(torch.float64).norm().clamp(min=1e-300))

        errors = {}
        for name, linear in parts.linears.items():
            with _forwarded(linear, parts.quantised(name)):
                errors[name] = error(run())
        for name, other in others.items():
            errors[name] = error(other())
    return errors


@contextmanager
def _remembering(linear: nn.Module) -> Iterator[None]:
    """Where the first input comes again, its output is given and not computed: what stands before
    a quantised part is as it was."""
    first: list[tuple[torch.Tensor, torch.Tensor]] = []
    compute = linear.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if first and torch.equal(first[0][0], x):
            return first[0][1]
        y = compute(x)
        if not first:
            first.append((x, y))
        return y

    with _forwarded(linear, forward):
        yield


@contextmanager
def _forwarded(
    module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """The module computes `forward` instead of its own."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
