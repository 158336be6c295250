"""The GPU's own time of decode steps and prompts, kernel by kernel: what is left to the clock's
(bench/hopper/decoder.py) is the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.ceilings import Ceilings
from bench.hopper.decoder import Executors, decode_row, prefill_row, random_prompt
from bench.rows import Row
from runtime.decoder.executor import DecoderRequest

_NUM_STEPS = 10


def kernel_seconds(
    work: Callable[[], object], device: torch.device, title: str, file: Path
) -> float:
    """Times all kernels of `work` (on a CPU: all operators); appends their table to `file`."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    if is_gpu:
        torch.cuda.synchronize()  # a step may be in flight, which is none of `work`'s
    with profile(activities=activities) as found:
        work()
        if is_gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if is_gpu else "self_cpu_time_total"
    averages = found.key_averages()
    with file.open("a") as log:
        print(title, averages.table(sort_by=key, row_limit=30, max_name_column_width=90), file=log)
    kind = "CUDA" if is_gpu else "CPU"  # an operator's own row repeats its kernels'
    return sum(getattr(each, key) for each in averages if each.device_type.name == kind) / 1e6


def measure_kernels(
    executors: Executors,
    batch_sizes: list[int],
    context: int,
    num_tokens: int,
    ceilings: Ceilings,
    device: torch.device,
    file: Path,
) -> Iterator[Row]:
    """Rows as `measure_decode`'s and `measure_prefill`'s, of the kernels alone."""
    for num_layers, (executor, config) in executors.items():
        vocab_size = config.decoder.vocab_size

        def steps(number: int, executor=executor) -> None:  # type: ignore[no-untyped-def]
            for _ in range(number):
                executor.step()

        for batch_size in batch_sizes:
            requests = [
                executor.submit(DecoderRequest(random_prompt(vocab_size, context, 7 + i), context))
                for i in range(batch_size)
            ]
            while len(executor.step()) < batch_size:
                pass
            title = f"{num_layers} layers, {_NUM_STEPS} decode steps, batch {batch_size}"
            seconds = kernel_seconds(lambda: steps(_NUM_STEPS), device, title, file) / _NUM_STEPS
            for request in requests:
                executor.cancel(request)
            yield decode_row(config, batch_size, context, seconds, ceilings, "decode, kernels")
        executor.submit(DecoderRequest(random_prompt(vocab_size, num_tokens, 5), 1))
        title = f"{num_layers} layers, prompt of {num_tokens} tokens"
        seconds = kernel_seconds(lambda: steps(1), device, title, file)
        peak = ceilings.fp8_flop_per_s
        yield prefill_row(config, num_tokens, seconds, peak, "prefill, kernels")
