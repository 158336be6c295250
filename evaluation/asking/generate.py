"""A task's samples through the engine: images are decoded and tiled ahead of it, requests share its
steps, and an answer is written the moment it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from queue import SimpleQueue

import torch
from tqdm import tqdm

from evaluation.asking.results_file import ResultsFile
from evaluation.datasets.sample import Sample
from evaluation.tasks import Task, answer_line
from nvlm.inputs.prompt import prompt_text
from nvlm.program.errors import UserError
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.runner import Runner
from runtime.serving.server import Answer, BusyError, Server

MAX_PREPARING_THREADS = 8
NUM_AHEAD = 8
"""Requests that wait with their images encoded, at most: 29 MB each at the 72B model's size."""


def generate(
    runner: Runner,
    task: Task,
    samples: list[Sample],
    defaults: GenerationRequest,
    file: ResultsFile,
) -> list[str]:
    """Answers what `file` lacks; returns what failed, a sentence for each sample."""
    todo = [sample for sample in samples if sample.id not in file.finished]
    failures = []
    requests = (sample_request(task, sample, defaults) for sample in todo)
    with tqdm(
        total=len(samples), initial=len(samples) - len(todo), desc=task.name, unit=" samples"
    ) as progress:
        for index, result in answers(runner, requests):
            sample = todo[index]
            if isinstance(result, UserError):
                failures.append(f"{task.name} sample {sample.id}: {result}")
            else:
                prompt = task_prompt(sample, defaults)
                file.append(answer_line(task, sample, prompt, result.text))
            progress.update()
    return failures


def task_prompt(sample: Sample, defaults: GenerationRequest) -> str:
    """As the answer lines have it."""
    return prompt_text(sample.content, defaults.system, defaults.prompt_format)


def sample_request(task: Task, sample: Sample, defaults: GenerationRequest) -> GenerationRequest:
    """EXIF is left alone, as the reference leaves it."""
    return replace(
        defaults,
        content=sample.content,
        apply_exif=False,
        max_num_tiles=task.max_num_tiles or defaults.max_num_tiles,
    )


def answers(
    runner: Runner, requests: Iterator[GenerationRequest]
) -> Iterator[tuple[int, GenerationResult | UserError]]:
    """(index, result or what was wrong with the request) as they finish.

    Beside the batch a few more are open: their images are being decoded, or wait encoded. On a CPU
    encoding and decoding, which overlap, get half of torch's threads each.
    """
    num_preparing = min(MAX_PREPARING_THREADS, len(os.sched_getaffinity(0)))
    num_waiting = min(NUM_AHEAD, runner.engine.limits.max_batch_size) + num_preparing
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // 2))
    server = Server(runner, max_queue_size=num_waiting, num_preparing=num_preparing)
    finished: SimpleQueue[tuple[int, Answer]] = SimpleQueue()
    num_open = 0

    def submit(index: int, request: GenerationRequest) -> bool:
        """Whether the server had room; one that takes nothing at all has ended."""

        def listen(answer: Answer) -> None:
            if answer.is_last:
                finished.put((index, answer))

        try:
            server.submit(request, listen)
        except BusyError:
            if num_open == 0:
                raise
            return False
        return True

    try:
        for index, request in enumerate(requests):
            while not submit(index, request):
                yield _result(*finished.get())
                num_open -= 1
            num_open += 1
        for _ in range(num_open):
            yield _result(*finished.get())
    finally:
        server.close()
        torch.set_num_threads(num_threads)


def _result(index: int, answer: Answer) -> tuple[int, GenerationResult | UserError]:
    if isinstance(answer.error, UserError):
        return index, answer.error
    if answer.error is not None:
        raise answer.error
    assert answer.result is not None, "the last answer has a result or an error"
    return index, answer.result
