"""Phases of the product on a GPU, each beside the device's ceilings of the same run.

    python -m bench.hopper decode prefill first_token serving vision [--shape 72b] [--layers 8,16]
        [--batch_sizes 1,8,64] [--context 2048] [--prompts 1948,2048] [--requests 256]
        [--answer 128] [--tiles 7] [--profile FILE]

A synthetic engine (bench/synthetic_engine.py) is loaded by the product's loader for each number of
layers; with several, the slope per layer is told too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper_decoder import measure_decode, measure_prefill, random_prompt
from bench.hopper_requests import measure_first_token, measure_serving
from bench.hopper_row import Row
from bench.hopper_vision import measure_vision
from bench.machine import describe, describe_gpu
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine_dir import EngineDir
from runtime.kernels import hopper

DECODER_PHASES = {"decode", "prefill", "first_token", "serving"}
PHASES = (*sorted(DECODER_PHASES), "vision")
PRECISIONS = ("bfloat16", "FP8")  # of vision


def measure_decoder(
    options: argparse.Namespace, num_layers: int, ceilings: Ceilings, device: torch.device
) -> Iterator[Row]:
    prompts = numbers(options.prompts)
    engine = synthetic_engine(
        options.shape,
        num_layers,
        max_batch_size=max(numbers(options.batch_sizes)),
        max_seq_len=max(options.context + 512, *prompts) + 64,
    )
    start = time.perf_counter()
    opened = open_model(
        engine,
        device,
        decoder_source(engine, device),
        use_graphs=not options.no_graphs,
        **settings(options),
    )
    executor = TorchDecoderExecutor.over(engine, opened)
    print(f"{num_layers} layers are ready after {time.perf_counter() - start:.1f} s", flush=True)
    config = engine.checkpoint_config
    if "decode" in options.phases:
        for batch_size in numbers(options.batch_sizes):
            yield measure_decode(
                executor, config, batch_size, options.context, ceilings, options.steps
            )
    if "prefill" in options.phases:
        for num_tokens in prompts:
            yield measure_prefill(executor, config, num_tokens, ceilings)
        yield measure_prefill(executor, config, prompts[0], ceilings, is_new=True)
    if "first_token" in options.phases:
        for precision in PRECISIONS:
            yield measure_first_token(executor, engine, precision, ceilings, device)
    if "serving" in options.phases:
        yield measure_serving(
            executor, config, options.requests, options.context, options.answer, ceilings
        )
    if options.profile is not None:
        profile(executor, engine, options, device)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Of `TritonForms`, those that are given."""
    found: dict[str, Any] = {
        name: True for name in ("use_fast_accum", "use_cudnn", "pdl") if getattr(options, name)
    }
    if options.prefetch_kb:
        from runtime.kernels.prefetch import Prefetch

        found["prefetch"] = Prefetch(options.prefetch_kb << 10, options.prefetch_rows)
    return found


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefetch_kb", type=int, default=0, help="of the next linear's weights")
    parser.add_argument("--prefetch_rows", type=int, default=1, help="whose beginnings they are")
    parser.add_argument("--pdl", action="store_true", help="programmatic dependent launch")
    parser.add_argument("--use_fast_accum", action="store_true")
    parser.add_argument("--use_cudnn", action="store_true", help="attention of whole prompts")
    parser.add_argument("--no_graphs", action="store_true")


def profile(
    executor: TorchDecoderExecutor,
    engine: EngineDir,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Appends the GPU's kernels of decode steps and of a prefill, by their time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    vocab_size = engine.checkpoint_config.decoder.vocab_size
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    @contextmanager
    def told(title: str) -> Iterator[None]:
        with profiler(activities=activities) as found:
            yield
            if device.type == "cuda":
                torch.cuda.synchronize()
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=90)
        with options.profile.open("a") as file:
            print(title, table, sep="\n", file=file)

    for batch_size in numbers(options.batch_sizes):
        requests = [
            executor.submit(
                DecoderRequest(random_prompt(vocab_size, options.context, 7 + i), options.context)
            )
            for i in range(batch_size)
        ]
        while len(executor.step()) < batch_size:
            pass
        with told(f"10 decode steps, batch {batch_size}"):
            for _ in range(10):
                executor.step()
        for request in requests:
            executor.cancel(request)
    executor.submit(DecoderRequest(random_prompt(vocab_size, numbers(options.prompts)[0], 5), 1))
    with told(f"prefill of {numbers(options.prompts)[0]} tokens"):
        executor.step()


def slopes(rows: list[Row]) -> list[dict[str, Any]]:
    """Milliseconds per layer between the smallest and the largest number of layers."""
    found = []
    for key in dict.fromkeys((row.phase, row.batch_size, row.num_tokens) for row in rows):
        same = [row for row in rows if (row.phase, row.batch_size, row.num_tokens) == key]
        low, high = same[0], same[-1]
        if high.num_layers > low.num_layers:
            slope = (high.ms - low.ms) / (high.num_layers - low.num_layers)
            names = ("phase", "batch_size", "num_tokens")
            fixed = low.ms - slope * low.num_layers
            found.append(
                {**dict(zip(names, key, strict=True)), "ms_per_layer": slope, "fixed_ms": fixed}
            )
    return found


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def rows_by_depth(
    layers: str, measure: Callable[[int], Iterable[Row]], device: torch.device
) -> list[Row]:
    """The rows of each number of layers, printed as they come, then what a layer adds."""
    rows = []
    for num_layers in numbers(layers):
        for row in measure(num_layers):
            print(row, flush=True)
            rows.append(row)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for slope in slopes(rows):
        print(
            f"{slope['phase']:<8}batch {slope['batch_size']:<3} {slope['num_tokens']:>5} tokens "
            f"{slope['ms_per_layer']:.4f} ms per layer, {slope['fixed_ms']:.3f} ms fixed"
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault(hopper.SWITCH, "1")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("phases", nargs="+", choices=PHASES)
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", default="8,16")
    parser.add_argument("--batch_sizes", default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", default="1948,2048")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--tiles", default="7")
    parser.add_argument("--steps", type=int, default=40)
    add_settings(parser)
    parser.add_argument("--profile", type=Path, help="append kernels' times to this file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    print(ceilings, flush=True)
    rows: list[Row] = []
    needs_decoder = DECODER_PHASES & {*options.phases}
    if needs_decoder:
        rows += rows_by_depth(
            options.layers, lambda n: measure_decoder(options, n, ceilings, device), device
        )
    if "vision" in options.phases:
        for precision in PRECISIONS:
            for num_tiles in numbers(options.tiles):
                row = measure_vision(options.shape, precision, num_tiles, ceilings, device)
                print(row, flush=True)
                rows.append(row)
    found = {
        "machine": describe() | describe_gpu(device),
        "ceilings": ceilings.to_json(),
        "rows": [row.to_json() for row in rows],
        "slopes": slopes(rows),
    }
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
