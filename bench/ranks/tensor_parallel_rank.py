"""One rank of bench/ranks/tensor_parallel.py, started by its `mpirun`.

Answers 40 questions of text and two with a picture on all ranks and on the leader alone, compares
tokens and logits, then times decode steps at batch 1, 8 and 64: the whole step, and in it the
reductions on the leader (which include waiting for the other ranks). Behind that the reduction of
[batch, hidden_size] alone: launched one by one, and captured in a CUDA graph, as many as a token
of 80 layers needs. `--output` is written after every stage, so that a hang loses only itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nvlm.program import command_line
from nvlm.program.json_files import write_json_atomically
from nvlm.program.launcher import World, end, rank_from
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.answers.compare import Run, record, report_json
from runtime.decoder.executor import DecoderExecutor, DecoderRequest
from runtime.ranks.mpi import Job
from runtime.ranks.open_parts import open_engine_on_ranks, open_parts_of_group
from runtime.ranks.process_group import ProcessGroup
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.support.tolerances import FLOAT32_LOGITS, FP8_FLIPPED

PHOTO = Path(__file__).parents[2] / "examples" / "coffee.jpg"
NUM_TEXTS, NUM_PICTURES, NEW_TOKENS = 40, 2, 12
BATCH_SIZES, PROMPT_TOKENS, NUM_STEPS, NUM_WARM_UPS = (1, 8, 64), 48, 24, 4
REDUCTIONS_PER_TOKEN = 2 * 80
TOLERANCES = {"float32": FLOAT32_LOGITS, "bfloat16": FP8_FLIPPED}


class TimedGroup(ProcessGroup):
    """Notes how long each reduction took, while `is_timing`."""

    def __init__(self, job: Job, device: torch.device) -> None:
        super().__init__(job, device)
        self.is_timing = False
        self._marks: list[tuple[Any, Any]] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_timing:
            return super().all_reduce(x)
        begin = _mark(self.device)
        x = super().all_reduce(x)
        self._marks.append((begin, _mark(self.device)))
        return x

    def take_ms(self) -> float:
        """The time of all reductions since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        total = sum(_elapsed_ms(begin, end) for begin, end in self._marks)
        self._marks.clear()
        return total


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


def open_runner(directory: Path, device: torch.device, job: Job, group: TimedGroup) -> Runner:
    engine = open_engine_on_ranks(directory, device, job)
    return Runner(engine, *open_parts_of_group(engine, device, group))


def questions() -> list[GenerationRequest]:
    texts = [(f"Question {i}: what is {i} times {i + 7}?", ()) for i in range(NUM_TEXTS)]
    pictures = [(f"Picture {i}: what is in the cup?", (PHOTO,)) for i in range(NUM_PICTURES)]
    return [
        GenerationRequest.images_first(prompt, images, max_new_tokens=NEW_TOKENS)
        for prompt, images in (*texts, *pictures)
    ]


def compared(many: Run, one: Run, dtype: str) -> dict[str, Any]:
    """`margins` of the answers that differ: see runtime.answers.compare."""
    report = report_json(many, one)
    rows = report["requests"]
    errors = [row["logit_error"] for row in rows]
    return {
        "num_requests": len(rows),
        "num_equal_answers": report["num_equal"],
        "margins": [row["margin"] for row in rows if row["first_differing_token"] is not None],
        "max_logit_error": max(errors),
        "median_logit_error": statistics.median(errors),
        "tolerance": TOLERANCES[dtype],
        "is_within_tolerance": max(errors) <= TOLERANCES[dtype],
        "max_vision_error": max(row["vision_error"] or 0.0 for row in rows),
    }


def time_steps(
    decoder: DecoderExecutor, vocab_size: int, batch_size: int, group: TimedGroup | None
) -> dict[str, float]:
    """Medians over the decode steps of a full batch, in ms."""
    rng = random.Random(0)
    num_new = NUM_WARM_UPS + NUM_STEPS
    for _ in range(batch_size):
        ids = [rng.randrange(vocab_size) for _ in range(PROMPT_TOKENS)]
        decoder.submit(DecoderRequest(ids, num_new + batch_size))
    waiting = batch_size
    while waiting:  # prompts join as the limit on tokens a step lets them
        waiting = batch_size - len(decoder.step())
    steps, reductions = [], []
    for index in range(num_new):
        if group is not None:
            group.is_timing = True
            group.take_ms()
        started = time.perf_counter()
        outputs = decoder.step()  # ends by drawing tokens on the CPU
        if index >= NUM_WARM_UPS and len(outputs) == batch_size:
            steps.append(1e3 * (time.perf_counter() - started))
            if group is not None:
                reductions.append(group.take_ms())
    if group is not None:
        group.is_timing = False
    while decoder.step():
        pass
    found = {"batch_size": batch_size, "step_ms": round(statistics.median(steps), 3)}
    if group is not None:
        found["reductions_in_step_ms"] = round(statistics.median(reductions), 3)
    return found


def time_reduction(group: ProcessGroup, rows: int, columns: int, dtype: torch.dtype) -> float:
    """Microseconds of one, launched one after another."""
    x = torch.zeros(rows, columns, dtype=dtype, device=group.device)
    num = 200 if group.device.type == "cuda" else 20
    for _ in range(num // 4):
        dist.all_reduce(x)
    begin = _mark(group.device)
    for _ in range(num):
        dist.all_reduce(x)
    finish = _mark(group.device)
    if group.device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * _elapsed_ms(begin, finish) / num


def time_captured(group: ProcessGroup, rows: int, columns: int, dtype: torch.dtype) -> float:
    """Milliseconds of `REDUCTIONS_PER_TOKEN` in one CUDA graph."""
    x = torch.zeros(rows, columns, dtype=dtype, device=group.device)
    dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(REDUCTIONS_PER_TOKEN):
            dist.all_reduce(x)
    times = []
    for _ in range(12):
        begin = _mark(group.device)
        graph.replay()
        finish = _mark(group.device)
        torch.cuda.synchronize()
        times.append(_elapsed_ms(begin, finish))
    return statistics.median(times[2:])


def reductions(group: ProcessGroup, columns: int, measure: Callable[..., float]) -> list[Any]:
    return [
        {
            "rows": rows,
            "dtype": str(dtype).removeprefix("torch."),
            "value": round(measure(group, rows, columns, dtype), 2),
        }
        for dtype in (torch.float32, torch.bfloat16)
        for rows in BATCH_SIZES
    ]


def follow(directory: Path, device: torch.device, job: Job) -> None:
    """A worker's part of the whole."""
    group = TimedGroup(job, device)
    runner = open_runner(directory, device, job, group)
    columns = runner.engine.checkpoint_config.decoder.hidden_size
    group.on("alone", lambda _: reductions(group, columns, time_reduction))
    group.on("captured", lambda _: reductions(group, columns, time_captured))
    group.follow()


def lead(arguments: argparse.Namespace, device: torch.device, job: Job) -> None:
    found: dict[str, Any] = {}

    def stage(name: str, value: Any) -> None:
        found[name] = value
        write_json_atomically(arguments.output, found)
        print(name, json.dumps(value), flush=True)

    group = TimedGroup(job, device)
    with open_runner(arguments.many, device, job, group) as runner:
        config = runner.engine.checkpoint_config
        columns, vocab_size = config.decoder.hidden_size, config.decoder.vocab_size
        many = record(runner, questions())
        stage("steps", [time_steps(runner.decoder, vocab_size, n, group) for n in BATCH_SIZES])
        with group.leading("alone", None):
            stage("reduction_us", reductions(group, columns, time_reduction))
        with Runner.open(arguments.one, device) as alone:
            stage("compared", compared(many, record(alone, questions()), config.dtype))
            times = [time_steps(alone.decoder, vocab_size, n, None) for n in BATCH_SIZES]
            stage("steps_of_one", times)
        if device.type == "cuda":
            with group.leading("captured", None):
                stage("token_reductions_ms", reductions(group, columns, time_captured))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("one", "many", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    set_up_cublas(os.environ)
    set_up_nccl(os.environ)
    with Job(World.from_environment(os.environ)) as job:
        device = job.device(torch.device(arguments.device))
        if job.world.rank > 0:
            follow(arguments.many, device, job)
        else:
            lead(arguments, device, job)


if __name__ == "__main__":
    command_line.run(main, rank=rank_from(os.environ), end=end)
