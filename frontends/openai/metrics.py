"""GET /metrics: the loop's counts for Prometheus, under the stems that vLLM's dashboards know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from frontends.openai.door import Door
from runtime.serving.metrics import METRICS, Labels, ServingMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_VLLM_NAMES = {
    "nvlm_requests_running": "nvlm_num_requests_running",
    "nvlm_requests_waiting": "nvlm_num_requests_waiting",
    "nvlm_generated_tokens_total": "nvlm_generation_tokens_total",
    "nvlm_queue_seconds": "nvlm_request_queue_time_seconds",
    "nvlm_time_per_output_token_seconds": "nvlm_inter_token_latency_seconds",
}
"""vLLM's stem after `nvlm_`, where the loop's name is another; a dashboard needs one rename."""

_SUCCESS = ("stop", "length")

Samples = Mapping[tuple[str, Labels], float]


def exposition(door: Door) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Exporter(door))
    return generate_latest(registry)


class _Exporter(Collector):
    def __init__(self, door: Door) -> None:
        self._door = door

    def collect(self) -> Iterable[Metric]:
        server = self._door.opened_server
        samples = ServingMetrics().samples() if server is None else server.samples()
        for name in METRICS:
            yield family(name, samples)
        success = CounterMetricFamily(
            "nvlm_request_success",
            "Requests answered, by how they ended",
            labels=["finished_reason"],
        )
        for reason in _SUCCESS:
            key = ("nvlm_requests_total", (("outcome", reason),))
            success.add_metric([reason], samples.get(key, 0.0))
        yield success


def family(name: str, samples: Samples) -> Metric:
    """A row of the loop's metrics with its values."""
    row, shown = METRICS[name], _VLLM_NAMES.get(name, name)
    if row.buckets:
        histogram = HistogramMetricFamily(shown, row.help)
        found = [
            (dict(labels)["le"], value)
            for (series, labels), value in samples.items()
            if series == f"{name}_bucket"
        ]
        empty = [*((f"{bound:g}", 0.0) for bound in row.buckets), ("+Inf", 0.0)]
        histogram.add_metric([], found or empty, samples.get((f"{name}_sum", ()), 0.0))
        return histogram
    kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
    made = kind(shown, row.help, labels=[row.label] if row.label else [])
    for (series, labels), value in samples.items():
        if series == name:
            made.add_metric([each for _, each in labels], value)
    return made
