"""The phases of the product, on whatever opens its parts (bench/hopper/parts.py), and their flags.

With several numbers of layers, which are measured in turns, the slope per layer is given too.
Prompts and tiles come after a pause, and again ("busy") without. serving goes to the executor
alone; with --serving, through the product's server. interactive comes first: its first picture
finds what a server finds that has just become ready. It and --serving are measured for each
--max_step_ms.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.ceilings import Ceilings
from bench.hopper.decoder import Executors, measure_decode, measure_prefill
from bench.hopper.interactive import MAX_BATCH_SIZE, measure_interactive, picture_tokens
from bench.hopper.parts import Parts
from bench.hopper.profile import measure_kernels
from bench.hopper.requests import measure_first_token
from bench.hopper.serving import Load, loads, measure_served, measure_serving
from bench.hopper.settings import measure_settings
from bench.hopper.vision import measure_vision
from bench.lists import amounts, counts
from bench.report import Measured, Report
from bench.rows import Row
from bench.synthetic_engine import DECODERS, VISIONS, synthetic_engine
from bench.synthetic_runner import synthetic_runner
from runtime.decoder.executor import DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.serving.engine_parts import vision_slice_ms
from runtime.vision.executor import VisionExecutor

DECODER_PHASES = {"decode", "prefill", "first_token", "serving", "interactive", "settings"}
PHASES = (*sorted(DECODER_PHASES), "vision")


def add_flags(parser: argparse.ArgumentParser, *, layers: str) -> None:
    """layers: the default of --layers."""
    add = parser.add_argument
    add("phases", nargs="+", choices=PHASES)
    add("--shape", choices=DECODERS, default="72b")
    add("--layers", type=counts, default=layers)
    add("--batch_sizes", type=counts, default="1,8,64")
    add("--context", type=int, default=2048)
    add("--prompts", type=counts, default="1948,2048")
    add("--requests", type=int, default=256)
    add("--answer", type=int, default=128)
    add(
        "--serving",
        type=loads,
        default=[],
        help="INPUT/OUTPUT/REQUESTS/AT_A_TIME (0: as many as fit), several with commas",
    )
    add("--picture_rate", type=amounts, default="1.0", help="a second, several with commas")
    add(
        "--max_step_ms",
        type=amounts,
        default="0",
        help="of interactive and --serving: longest step beside rows that decode, several with "
        "commas",
    )
    add("--seconds", type=float, default=15.0, help="of each picture rate")
    add("--tiles", type=counts, default="7")
    add("--precisions", default="bfloat16,FP8", help="of vision, for first_token and vision")
    add("--fp8_head", action="store_true", help="the decoder's head is in FP8 too")
    add("--no_graphs", action="store_true")
    add("--profile", type=Path, help="kernels' times, their tables to this file")
    add("--output", type=Path, help="the rows so far as JSON, after every row")


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.serving and "serving" not in options.phases:
        parser.error("--serving is given without the phase serving; add it")
    return options


def measure(options: argparse.Namespace, parts: Parts, ceilings: Ceilings, report: Report) -> None:
    if DECODER_PHASES & {*options.phases}:
        report.show(measure_decoder(options, parts, ceilings))
    if "vision" in options.phases:
        engine = synthesize(options, parts.num_ranks, 1)
        for precision in options.precisions.split(","):
            for num_tiles in options.tiles:
                report.show(measure_vision(parts, engine, precision, num_tiles, ceilings))


def measure_decoder(
    options: argparse.Namespace, parts: Parts, ceilings: Ceilings
) -> Iterator[Measured]:
    """Measures all numbers of layers in turns; what has one number only, with the last.

    All phases share one load. As in the product, vision is there before the decoder.
    """
    depths, vision = options.layers, None
    executors: Executors = {}
    bounds = options.max_step_ms
    if "interactive" in options.phases or options.serving:
        vision = open_vision(parts, synthesize(options, parts.num_ranks, depths[-1]), bounds[0])
    for num_layers in depths:
        engine = synthesize(options, parts.num_ranks, num_layers)
        start = time.perf_counter()
        executors[num_layers] = parts.decoder(engine), engine.checkpoint_config
        seconds = time.perf_counter() - start
        print(f"{num_layers} layers are ready after {seconds:.1f} s", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder, decoder = Path(name), executors[depths[-1]][0]
        if vision is not None:
            runner = synthetic_runner(folder, engine, vision, decoder)
        if "interactive" in options.phases:
            for number, max_step_ms in enumerate(bounds):
                decoder.bound_steps(max_step_ms, parts.device)
                if number > 0:
                    runner.vision = open_vision(parts, engine, max_step_ms)
                yield from measure_interactive(
                    runner,
                    folder / f"pictures_{number}",
                    options.picture_rate,
                    options.seconds,
                    options.context,
                    max_step_ms,
                    is_fresh=number == 0,
                )
        decoder.bound_steps(0.0, parts.device)
        yield from measure_executors(options, executors, engine, parts, ceilings)
        for max_step_ms in bounds if options.serving else ():
            decoder.bound_steps(max_step_ms, parts.device)
            for index, load in enumerate(options.serving):
                first_seed = 10_000 * (1 + index)
                yield measure_served(runner, load, ceilings, first_seed, max_step_ms)


def open_vision(parts: Parts, engine: EngineDir, max_step_ms: float) -> VisionExecutor:
    """Opens vision in the slices of a server with that bound."""
    options = DecoderOptions(max_step_ms=max_step_ms)
    return parts.vision(engine, "FP8", vision_slice_ms(engine, parts.device, options))


def measure_executors(
    options: argparse.Namespace,
    executors: Executors,
    engine: EngineDir,
    parts: Parts,
    ceilings: Ceilings,
) -> Iterator[Row]:
    """Measures what goes to the executors alone; `engine` is the last one's."""
    prompts, batch_sizes = options.prompts, options.batch_sizes
    executor, config = list(executors.values())[-1]
    if "decode" in options.phases:
        for batch_size in batch_sizes:
            yield from measure_decode(executors, batch_size, options.context, ceilings)
    if "settings" in options.phases:
        for batch_size in batch_sizes:
            yield from measure_settings(executors, batch_size, options.context, ceilings)
    if "prefill" in options.phases:
        for num_tokens in prompts:
            yield from measure_prefill(executors, num_tokens, ceilings)
            yield from measure_prefill(executors, num_tokens, ceilings, is_busy=True)
        yield from measure_prefill(executors, prompts[0], ceilings, is_new=True)
    if "first_token" in options.phases:
        for precision in options.precisions.split(","):
            yield measure_first_token(executor, engine, parts, precision, ceilings)
    if "serving" in options.phases and not options.serving:
        at_once = Load(options.context, options.answer, options.requests, 0)
        yield measure_serving(executor, config, at_once, ceilings)
    if options.profile is not None:
        yield from measure_kernels(
            executors,
            batch_sizes,
            options.context,
            prompts[0],
            ceilings,
            parts.device,
            options.profile,
        )


def synthesize(options: argparse.Namespace, num_ranks: int, num_layers: int) -> EngineDir:
    """An engine whose limits hold what the phases ask for."""
    batch_sizes, lengths = [*options.batch_sizes], [*options.prompts]
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
        tp_size=num_ranks,
        quantize_lm_head=options.fp8_head,
    )
