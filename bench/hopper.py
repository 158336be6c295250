"""Phases of the product on a GPU, each beside the device's ceilings of the same run.

    python -m bench.hopper decode prefill first_token serving vision [--shape 72b] [--layers 8,16]
        [--batch_sizes 1,8,64] [--context 2048] [--prompts 1948,2048] [--requests 256]
        [--answer 128] [--tiles 7] [--profile FILE]

A synthetic engine (bench/synthetic_engine.py) is loaded by the product's loader for each number of
layers; with several, which are measured in turns, the slope per layer is told too. Prompts and
tiles come after a pause, and again ("busy") without. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper_decoder import Executors, measure_decode, measure_prefill
from bench.hopper_profile import measure_kernels
from bench.hopper_requests import measure_first_token, measure_serving
from bench.hopper_row import Row
from bench.hopper_vision import measure_vision
from bench.machine import describe, describe_gpu
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from runtime.decoder.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor

DECODER_PHASES = {"decode", "prefill", "first_token", "serving"}
PHASES = (*sorted(DECODER_PHASES), "vision")
PRECISIONS = ("bfloat16", "FP8")  # of vision


def measure_decoder(
    options: argparse.Namespace, ceilings: Ceilings, device: torch.device
) -> Iterator[Row]:
    """Of all numbers of layers in turns; what has one number only, of the last."""
    prompts, depths = numbers(options.prompts), numbers(options.layers)
    executors: Executors = {}
    for num_layers in depths:
        engine = synthetic_engine(
            options.shape,
            num_layers,
            max_batch_size=max(numbers(options.batch_sizes)),
            max_seq_len=max(options.context + 512, *prompts) + 64,
        )
        start = time.perf_counter()
        opened = open_model(
            engine, device, decoder_source(engine, device), use_graphs=not options.no_graphs
        )
        config = engine.checkpoint_config
        executors[num_layers] = TorchDecoderExecutor.over(engine, opened), config
        executors[num_layers][0].prepare_thread()
        seconds = time.perf_counter() - start
        print(f"{num_layers} layers are ready after {seconds:.1f} s", flush=True)
    if "decode" in options.phases:
        for batch_size in numbers(options.batch_sizes):
            yield from measure_decode(executors, batch_size, options.context, ceilings)
    if "prefill" in options.phases:
        for num_tokens in prompts:
            yield from measure_prefill(executors, num_tokens, ceilings)
            yield from measure_prefill(executors, num_tokens, ceilings, is_busy=True)
        yield from measure_prefill(executors, prompts[0], ceilings, is_new=True)
    executor, config = executors[depths[-1]]
    if "first_token" in options.phases:
        for precision in PRECISIONS:
            yield measure_first_token(executor, engine, precision, ceilings, device)
    if "serving" in options.phases:
        yield measure_serving(
            executor, config, options.requests, options.context, options.answer, ceilings
        )
    if options.profile is not None:
        yield from measure_kernels(
            executors,
            numbers(options.batch_sizes),
            options.context,
            prompts[0],
            ceilings,
            device,
            options.profile,
        )


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


def told(measured: Iterable[Row]) -> list[Row]:
    """The rows, printed as they come, then what a layer adds."""
    rows = []
    for row in measured:
        print(row, flush=True)
        rows.append(row)
    for slope in slopes(rows):
        print(
            f"{slope['phase']:<8}batch {slope['batch_size']:<3} {slope['num_tokens']:>5} tokens "
            f"{slope['ms_per_layer']:.4f} ms per layer, {slope['fixed_ms']:.3f} ms fixed"
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
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
    parser.add_argument("--no_graphs", action="store_true")
    parser.add_argument("--profile", type=Path, help="kernels' times, their tables to this file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    print(ceilings, flush=True)
    rows: list[Row] = []
    needs_decoder = DECODER_PHASES & {*options.phases}
    if needs_decoder:
        rows += told(measure_decoder(options, ceilings, device))
    if "vision" in options.phases:
        for precision in PRECISIONS:
            for num_tiles in numbers(options.tiles):
                rows += told(measure_vision(options.shape, precision, num_tiles, ceilings, device))
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
