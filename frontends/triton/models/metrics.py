"""Copies the server's counters (runtime.serving.metrics) into Triton's Prometheus registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from runtime.serving.metrics import Labels, metric_of


class MetricsExporter:
    def __init__(self) -> None:
        self._families: dict[str, Any] = {}
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._exported: dict[tuple[str, Labels], float] = {}

    def export(self, samples: Mapping[tuple[str, Labels], float]) -> None:
        """Brings every series that changed up to date."""
        for series, value in samples.items():
            change = value - self._exported.get(series, 0.0)
            if change or series not in self._metrics:
                self._metric(*series).increment(change)
                self._exported[series] = value

    def _metric(self, name: str, labels: Labels) -> Any:
        if name not in self._families:
            row = metric_of(name)
            self._families[name] = pb_utils.MetricFamily(
                name=name,
                description=row.help,
                kind=getattr(pb_utils.MetricFamily, row.kind.upper()),
            )
        if (name, labels) not in self._metrics:
            self._metrics[name, labels] = self._families[name].Metric(labels=dict(labels))
        return self._metrics[name, labels]
