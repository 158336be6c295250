"""The metrics of all replicas as one exposition: each series with the name of its replica."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def merged(pages: Iterable[tuple[str, str]]) -> bytes:
    """pages: the name of a replica and the text of its /metrics, for each."""
    registry = CollectorRegistry()
    registry.register(_Exporter(tuple(pages)))
    return generate_latest(registry)


class _Exporter(Collector):
    def __init__(self, pages: tuple[tuple[str, str], ...]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._pages:
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for name, labels, value, *_ in family.samples:
                    kept.add_sample(name, {**labels, "replica": replica}, value)
        return families.values()
