"""Where a decoder layer's time goes in a conversion: seconds of the thread that computes.

A part that asks a GPU for a number waits for all that was asked of it before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from build.conversion import decoder_step
from build.conversion.decoder_step import DecoderStep
from build.conversion.output_files import OutputFiles
from build.conversion.pipeline import ReadAhead
from build.conversion.quantization.layer_tensors import LayerTensors

_LAYER = "rest"
_PARTS = (
    (ReadAhead, "read", "wait for the source"),
    (LayerTensors, "whole", "cast to the device"),
    (decoder_step, "run_layer", "run the samples"),
    (decoder_step, "report_linears", "errors of linears"),
    (decoder_step, "probe_layer", "residual errors"),
    (OutputFiles, "append", "wait for the writing thread"),
    (DecoderStep, "_run_layer", _LAYER),
)


class LayerTimes:
    """Replaces the parts by timed ones, for the rest of the process."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys((part for *_, part in _PARTS), 0.0)
        self._num_layers = 0
        self._inner: list[float] = []  # of each part in progress, what parts inside it took
        self._thread = threading.current_thread()
        for owner, name, part in _PARTS:
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def per_layer(self) -> dict[str, float]:
        """Mean seconds by part, each without the parts inside it."""
        return {part: total / max(1, self._num_layers) for part, total in self._seconds.items()}

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            is_elsewhere = threading.current_thread() is not self._thread
            if is_elsewhere or not (self._inner or part == _LAYER):
                return function(*arguments, **named)
            self._num_layers += part == _LAYER
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds = time.perf_counter() - start
                self._seconds[part] += seconds - self._inner.pop()
                if self._inner:
                    self._inner[-1] += seconds

        return timed
