"""A benchmark task beside the engine alone: does the engine wait for pictures?

    python -m bench.serving.evaluation --engine_dir D [--device cuda] [--num_samples N]
        [--repeats N] [--shape 72b --layers 80]

The engine alone answers the same requests with their tiles in memory. The task reads JPEG files of
a camera's size, decodes, tiles, answers and writes its lines. The two take turns, so that a busy
machine slows both; processor time stands beside the clock's. With --shape, models of that shape
with random weights, vision in FP8, stand in for the engine's own, of which the tokenizer is left.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.hopper.parts import load_vision
from bench.machine import describe
from bench.photos import write_photos
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from evaluation.asking.generate import generate, sample_request
from evaluation.asking.results_file import ResultsFile
from evaluation.datasets.prompts import short_answer
from evaluation.datasets.sample import Sample
from evaluation.tasks import TASKS
from nvlm.inputs.images import load_image
from nvlm.inputs.tiling import tile_image
from nvlm.program.command_line import resolve_device
from nvlm.program.process import set_up_cublas
from runtime.decoder.models.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner

TASK = TASKS["TextVQA"]


@dataclass(frozen=True, slots=True)
class Taken:
    seconds: float
    cpu_seconds: float


class _Clock:
    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> Taken:
        return Taken(time.perf_counter() - self._started[0], time.process_time() - self._started[1])


def measure_engine(runner: Runner, requests: list[GenerationRequest]) -> Taken:
    """Times the requests alone, whose images are tiles already."""
    clock = _Clock()
    for _, result in runner.generate_batch(requests):
        if isinstance(result, Exception):
            raise result
    return clock.read()


def measure_task(
    runner: Runner, samples: list[Sample], defaults: GenerationRequest, output: Path
) -> Taken:
    """Times the task, from files to lines."""
    output.unlink(missing_ok=True)
    clock = _Clock()
    with ResultsFile(output, TASK, samples) as file:
        failures = generate(runner, TASK, samples, defaults, file)
    taken = clock.read()
    assert not failures, failures[0]
    return taken


def measure(runner: Runner, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every pass has pictures of its own, whose blocks no earlier one has left in the KV cache."""
    question = "\n" + short_answer("What is in the cup?")
    num_samples, repeats = arguments.num_samples, arguments.repeats
    photos = write_photos(folder, (1 + 2 * repeats) * num_samples)
    passes = [photos[i :: 1 + 2 * repeats] for i in range(1 + 2 * repeats)]
    defaults = GenerationRequest(
        content=(), prompt_format="megatron", max_new_tokens=arguments.max_new_tokens
    )
    tiling = runner.engine.tiling
    num_tiles, decode_s = 0, 0.0

    def requests(paths: list[Path]) -> list[GenerationRequest]:
        nonlocal num_tiles, decode_s
        start = time.perf_counter()
        tiled = [tile_image(load_image(p), tiling.image_size, tiling.max_num_tiles) for p in paths]
        decode_s = time.perf_counter() - start
        num_tiles = sum(image.num_tiles for image in tiled)
        return [
            sample_request(TASK, Sample(i, (image, question), {}), defaults)
            for i, image in enumerate(tiled)
        ]

    def samples(paths: list[Path]) -> list[Sample]:
        return [Sample(i, (path, question), {"gt_answer": [""]}) for i, path in enumerate(paths)]

    measure_engine(runner, requests(passes[-1])[: runner.engine.limits.max_batch_size])
    engine, task = [], []
    for repeat in range(repeats):
        engine.append(measure_engine(runner, requests(passes[2 * repeat])))
        pictures = samples(passes[2 * repeat + 1])
        task.append(measure_task(runner, pictures, defaults, folder / "answers.jsonl"))
    return {
        "num_samples": num_samples,
        "num_tiles": num_tiles,
        "max_batch_size": runner.engine.limits.max_batch_size,
        "decode_and_tile_ms_per_image": 1e3 * decode_s / num_samples,
        "engine_samples_per_s": num_samples / statistics.median(e.seconds for e in engine),
        "task_samples_per_s": num_samples / statistics.median(t.seconds for t in task),
        "task_share_of_engine": statistics.median(
            e.seconds / t.seconds for e, t in zip(engine, task, strict=True)
        ),
        "engine_cpu_s_per_sample": statistics.median(e.cpu_seconds for e in engine) / num_samples,
        "task_cpu_s_per_sample": statistics.median(t.cpu_seconds for t in task) / num_samples,
        "load_average": os.getloadavg()[0],
    }


def random_runner(arguments: argparse.Namespace, device: torch.device) -> Runner:
    engine = replace(
        synthetic_engine(arguments.shape, arguments.layers, max_batch_size=16, max_seq_len=4096),
        directory=arguments.engine_dir,
    )
    model = open_model(engine, device, decoder_source(engine, device))
    decoder = TorchDecoderExecutor.over(engine, model)
    return Runner(engine, load_vision(engine, "FP8", device), decoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--num_samples", type=int, default=48)
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=DECODERS, help="of random models")
    parser.add_argument("--layers", type=int, default=80)
    arguments = parser.parse_args()
    set_up_cublas(os.environ)
    device = resolve_device(arguments.device)

    def runner() -> Runner:
        if arguments.shape is not None:
            return random_runner(arguments, device)
        return Runner.open(arguments.engine_dir, device)

    with tempfile.TemporaryDirectory() as folder, runner() as run:
        result = {
            "machine": describe(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "shape": arguments.shape and f"{arguments.shape}, {arguments.layers} layers",
            **measure(run, Path(folder), arguments),
        }
    print(f"engine alone  {result['engine_samples_per_s']:8.2f} samples/s")
    print(f"task          {result['task_samples_per_s']:8.2f} samples/s, from files to lines")
    print(f"share         {result['task_share_of_engine']:8.1%}, the middle one of the pairs")
    print(
        f"processor     {result['engine_cpu_s_per_sample']:8.3f} s a sample alone, "
        f"{result['task_cpu_s_per_sample']:.3f} s in the task"
    )
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
