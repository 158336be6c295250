"""Phases of the product on a GPU, each beside the device's ceilings of the same run.

    python -m bench.hopper decode prefill first_token serving interactive vision [--shape 72b]
        [--layers 8,16] [--batch_sizes 1,8,64] [--context 2048] [--prompts 1948,2048]
        [--requests 256] [--answer 128] [--serving 2048/128/256/64] [--picture_rate 0,1,2]
        [--seconds 15] [--tiles 7] [--profile FILE]

The product's loader loads a synthetic engine (bench/synthetic_engine.py) for each number
of layers; with several, which are measured in turns, the slope per layer is told too. Prompts and
tiles come after a pause, and again ("busy") without. serving goes to the executor alone; with
--serving, through the product's server. interactive comes first: its first picture finds what a
server finds that has just become ready. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper.decoder import Executors, measure_decode, measure_prefill
from bench.hopper.interactive import MAX_BATCH_SIZE, measure_interactive, picture_tokens
from bench.hopper.profile import measure_kernels
from bench.hopper.requests import measure_first_token
from bench.hopper.serving import Load, loads, measure_served, measure_serving
from bench.hopper.vision import load_vision, measure_vision
from bench.machine import describe, describe_gpu
from bench.report import Measured, slopes, told
from bench.rows import Row
from bench.synthetic_engine import DECODERS, VISIONS, decoder_source, synthetic_engine
from bench.synthetic_runner import synthetic_runner
from nvlm.program.process import set_up_cublas
from runtime.decoder.models.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir

DECODER_PHASES = {"decode", "prefill", "first_token", "serving", "interactive"}
PHASES = (*sorted(DECODER_PHASES), "vision")
PRECISIONS = ("bfloat16", "FP8")  # of vision


def measure_decoder(
    options: argparse.Namespace, ceilings: Ceilings, device: torch.device
) -> Iterator[Measured]:
    """Measures all numbers of layers in turns; what has one number only, with the last.

    All phases share one load. As in the product, vision is there before the decoder.
    """
    depths, vision = numbers(options.layers), None
    executors: Executors = {}
    if "interactive" in options.phases or options.serving:
        vision = load_vision(synthesize(options, depths[-1]), "FP8", device)
        vision.warm_up()
    for num_layers in depths:
        engine = synthesize(options, num_layers)
        start = time.perf_counter()
        opened = open_model(
            engine, device, decoder_source(engine, device), use_graphs=not options.no_graphs
        )
        config = engine.checkpoint_config
        executors[num_layers] = TorchDecoderExecutor.over(engine, opened), config
        seconds = time.perf_counter() - start
        print(f"{num_layers} layers are ready after {seconds:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, decoder = Path(name), executors[depths[-1]][0]
        if vision is not None:
            runner = synthetic_runner(folder, engine, vision, decoder)
        if "interactive" in options.phases:
            rates = [float(rate) for rate in options.picture_rate.split(",")]
            yield from measure_interactive(
                runner, folder / "pictures", rates, options.seconds, options.context
            )
        yield from measure_executors(options, executors, engine, ceilings, device)
        for index, load in enumerate(options.serving):
            yield measure_served(runner, load, ceilings, first_seed=10_000 * (1 + index))


def measure_executors(
    options: argparse.Namespace,
    executors: Executors,
    engine: EngineDir,
    ceilings: Ceilings,
    device: torch.device,
) -> Iterator[Row]:
    """Measures what goes to the executors alone; `engine` is the last one's."""
    prompts, batch_sizes = numbers(options.prompts), numbers(options.batch_sizes)
    executor, config = list(executors.values())[-1]
    for each, _ in executors.values():
        each.warm_up()
    if "decode" in options.phases:
        for batch_size in batch_sizes:
            yield from measure_decode(executors, batch_size, options.context, ceilings)
    if "prefill" in options.phases:
        for num_tokens in prompts:
            yield from measure_prefill(executors, num_tokens, ceilings)
            yield from measure_prefill(executors, num_tokens, ceilings, is_busy=True)
        yield from measure_prefill(executors, prompts[0], ceilings, is_new=True)
    if "first_token" in options.phases:
        for precision in PRECISIONS:
            yield measure_first_token(executor, engine, precision, ceilings, device)
    if "serving" in options.phases and not options.serving:
        at_once = Load(options.context, options.answer, options.requests, 0)
        yield measure_serving(executor, config, at_once, ceilings)
    if options.profile is not None:
        yield from measure_kernels(
            executors, batch_sizes, options.context, prompts[0], ceilings, device, options.profile
        )


def synthesize(options: argparse.Namespace, num_layers: int) -> EngineDir:
    """An engine whose limits hold what the phases ask for."""
    batch_sizes, lengths = numbers(options.batch_sizes), numbers(options.prompts)
    lengths.append(options.context + 512)
    for load in options.serving:
        batch_sizes.append(load.at_a_time)
        lengths.append(load.num_input + load.num_output)
    if "interactive" in options.phases:
        batch_sizes.append(MAX_BATCH_SIZE)
        lengths.append(picture_tokens(VISIONS[options.shape]))
    return synthetic_engine(
        options.shape,
        num_layers,
        max_batch_size=max(batch_sizes),
        max_seq_len=max(lengths) + 64,
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


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
    parser.add_argument(
        "--serving",
        type=loads,
        default=[],
        help="INPUT/OUTPUT/REQUESTS/AT_A_TIME (0: as many as fit), several with commas",
    )
    parser.add_argument("--picture_rate", default="1.0", help="a second, several with commas")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each picture rate")
    parser.add_argument("--tiles", default="7")
    parser.add_argument("--no_graphs", action="store_true")
    parser.add_argument("--profile", type=Path, help="kernels' times, their tables to this file")
    options = parser.parse_args(arguments)
    if options.serving and "serving" not in options.phases:
        parser.error("--serving is given without the phase serving; add it")
    set_up_cublas(os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    print(ceilings, flush=True)
    rows: list[Measured] = []
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
