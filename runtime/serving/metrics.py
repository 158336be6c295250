"""What a server counts, in Prometheus' terms: counters, gauges and histograms by name.

Held in memory; who exports them (frontends/) reads `samples`.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_STEP_SECONDS = (
    *(0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

Labels = tuple[tuple[str, str], ...]

WAIT_CAUSES = ("preparation", "place", "blocks", "equal_prompt", "step")
"""What a request waits for: threads that prepare and encode it, a place in the batch, and what
`runtime.decoder.executor.WaitCause` says."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A row."""

    kind: Literal["counter", "gauge"]  # Prometheus's type
    help: str  # of the text format
    label: str | None = None  # name of its one label; None: it has none
    buckets: tuple[float, ...] = ()  # upper bounds, which make it a histogram


METRICS: dict[str, Metric] = {
    "nvlm_requests_total": Metric("counter", "Requests that ended, by how", "outcome"),
    "nvlm_prompt_tokens_total": Metric("counter", "Prompt tokens, virtual ones included"),
    "nvlm_generated_tokens_total": Metric("counter", "Tokens of finished answers"),
    "nvlm_tiles_total": Metric("counter", "Image tiles encoded"),
    "nvlm_requests_running": Metric("gauge", "Requests in the decoder's batch"),
    "nvlm_requests_waiting": Metric("gauge", "Requests accepted and not yet in the batch"),
    "nvlm_requests_waiting_by_cause": Metric(
        "gauge",
        "Requests that no step computes, by what they wait for",
        "cause",
    ),
    "nvlm_computed_prompt_tokens_total": Metric(
        "counter", "Prompt tokens computed, by whether another request decoded beside", "beside"
    ),
    "nvlm_vision_seconds_total": Metric("counter", "Time in which pictures were encoded"),
    "nvlm_step_seconds": Metric(
        "counter", "A step of the decoder, until its tokens are there", buckets=_STEP_SECONDS
    ),
    "nvlm_queue_seconds": Metric(
        "counter",
        "Waiting until the decoder has it, without tiling and vision",
        buckets=_SECONDS,
    ),
    "nvlm_time_to_first_token_seconds": Metric(
        "counter", "From acceptance to the first token", buckets=_SECONDS
    ),
    "nvlm_time_per_output_token_seconds": Metric(
        "counter", "Between the tokens of a request after its first", buckets=_SECONDS
    ),
    "nvlm_e2e_request_latency_seconds": Metric(
        "counter", "From acceptance to the whole answer", buckets=_SECONDS
    ),
    "nvlm_request_prefill_time_seconds": Metric(
        "counter", "From the decoder's queue to the first token", buckets=_SECONDS
    ),
    "nvlm_request_decode_time_seconds": Metric(
        "counter", "From the first token to the last", buckets=_SECONDS
    ),
    "nvlm_request_inference_time_seconds": Metric(
        "counter", "From the decoder's queue to the last token", buckets=_SECONDS
    ),
    "nvlm_request_time_per_output_token_seconds": Metric(
        "counter", "Mean time between the tokens of a request", buckets=_SECONDS
    ),
    "nvlm_kv_cache_usage_perc": Metric("gauge", "Share of KV blocks in use, from 0 to 1"),
    "nvlm_num_preemptions_total": Metric("counter", "Requests that gave up their KV blocks"),
    "nvlm_prefix_cache_queries_total": Metric("counter", "Prompt tokens looked up in KV blocks"),
    "nvlm_prefix_cache_hits_total": Metric("counter", "Prompt tokens found there"),
    "nvlm_mm_cache_queries_total": Metric("counter", "Pictures looked up among the encoded ones"),
    "nvlm_mm_cache_hits_total": Metric("counter", "Pictures found there, which are not encoded"),
    "nvlm_decode_batch_size": Metric("counter", "Requests that shared a step", buckets=_COUNTS),
}


class _Histogram:
    """Cheap to observe, because every token is; cumulative only when it is read."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = (*bounds, math.inf)
        self._counts = [0] * len(self._bounds)  # above the bound before, up to this one
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self, name: str) -> Iterator[tuple[tuple[str, Labels], float]]:
        """Cumulative buckets, sum and count, as Prometheus defines them."""
        total = 0
        for bound, count in zip(self._bounds, self._counts, strict=True):
            total += count
            yield (f"{name}_bucket", (("le", _bound(bound)),)), float(total)
        yield (f"{name}_sum", ()), self._sum
        yield (f"{name}_count", ()), float(total)


class ServingMetrics:
    """Any thread may count; every name is a row of `METRICS`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._histograms: dict[str, _Histogram] = {}
        self._values: defaultdict[tuple[str, Labels], float] = defaultdict(float)
        for name, metric in METRICS.items():
            if metric.label is None and not metric.buckets:
                self._values[name, ()] = 0.0  # seen before anything happens

    def add(self, name: str, amount: float = 1.0, label: str = "") -> None:
        with self._lock:
            self._values[name, _labels(name, label)] += amount

    def set(self, name: str, value: float, label: str = "") -> None:
        with self._lock:
            self._values[name, _labels(name, label)] = value

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            if name not in self._histograms:
                self._histograms[name] = _Histogram(METRICS[name].buckets)
            self._histograms[name].observe(value)

    def samples(self) -> dict[tuple[str, Labels], float]:
        """The value of every series that has one: (name, labels) -> value."""
        with self._lock:
            values = dict(self._values)
            for name, histogram in self._histograms.items():
                values.update(histogram.samples(name))
            return values


def metric_of(series_name: str) -> Metric:
    """The row of a series' name, which for a histogram carries a suffix."""
    return METRICS.get(series_name) or METRICS[series_name.rpartition("_")[0]]


def _labels(name: str, label: str) -> Labels:
    key = METRICS[name].label
    return ((key, label),) if key else ()


def _bound(value: float) -> str:
    return "+Inf" if value == math.inf else f"{value:g}"
