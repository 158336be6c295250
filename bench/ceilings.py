"""What the device can do at best, measured in the run that a result is compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from nvlm.model.number_formats import fp8

_LAUNCHES = 8  # in one graph


def median_ms(run: Callable[[int], object], device: torch.device) -> float:
    """The median time of one launch in a CUDA graph.

    `run` takes the launch's number, for buffers to rotate.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        run(0)
        return 1e3 * (time.perf_counter() - start)
    for i in range(_LAUNCHES):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(_LAUNCHES):
            run(i)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / _LAUNCHES)
    return statistics.median(times[2:])


@dataclass(frozen=True, slots=True)
class Ceilings:
    """copy counts bytes read and written; products are 8192^3 on random data."""

    copy_bytes_per_s: float
    bf16_flop_per_s: float
    fp8_flop_per_s: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bytes_per_s / 1e12:.3f} TB/s, bf16 "
            f"{self.bf16_flop_per_s / 1e12:.0f} TFLOP/s, FP8 {self.fp8_flop_per_s / 1e12:.0f} "
            "TFLOP/s"
        )


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by an elementwise kernel: the driver's own copy is slower."""
    source = torch.randn(1 << 29 if device.type == "cuda" else 1 << 18, device=device)
    target = torch.empty_like(source)
    return 8e3 * source.numel() / median_ms(lambda _: torch.neg(source, out=target), device)


def peer_copy_rate() -> float | None:
    """Bytes a second from another GPU of this machine to the first; None where there is no other
    that torch sees."""
    if torch.cuda.device_count() < 2:
        return None
    target, source = (
        torch.empty(1 << 28, dtype=torch.uint8, device=f"cuda:{index}") for index in range(2)
    )
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(0):
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return target.nbytes / statistics.median(times[2:])


def measure_ceilings(device: torch.device) -> Ceilings:
    size = 8192 if device.type == "cuda" else 64
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    bf16_ms = median_ms(lambda _: a @ b, device)
    fp8_ms = bf16_ms
    if device.type == "cuda":
        a8, b8 = (fp8.quantize(x, 1 / 90) for x in (a, b))
        one = torch.ones((), device=device)
        fp8_ms = median_ms(
            lambda _: torch._scaled_mm(
                a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
            ),
            device,
        )
    flop = 2e3 * size**3
    return Ceilings(copy_rate(device), flop / bf16_ms, flop / fp8_ms)
