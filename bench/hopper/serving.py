"""Throughput of many text requests: by the executor alone, or through runtime/serving's `Server`.

The executor alone is what earlier result files hold: token ids, all submitted at once, no thread
beside. The server adds what a user's request passes: tokenizer, threads, text. So the two numbers
differ by what that costs, and each is a row of its own.
"""

from __future__ import annotations

import time
from argparse import ArgumentTypeError
from collections import Counter
from dataclasses import dataclass
from queue import SimpleQueue

from bench.ceilings import Ceilings
from bench.hopper.decoder import prefill_flop, random_prompt, step_bytes
from bench.rows import Row
from bench.synthetic_runner import text_request
from nvlm.formats.checkpoint_config import CheckpointConfig
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.runner import Runner
from runtime.serving.server import Server


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of num_input tokens that are answered with num_output, at_a_time of them together;
    0: as many as the engine takes."""

    num_input: int
    num_output: int
    num_requests: int
    at_a_time: int


def loads(text: str) -> list[Load]:
    """Reads INPUT/OUTPUT/REQUESTS/AT_A_TIME, several with commas."""
    found = []
    for part in text.split(","):
        fields = part.split("/")
        if len(fields) != 4 or not all(field.isdecimal() for field in fields):
            raise ArgumentTypeError(
                f"{part!r} is no load; expected INPUT/OUTPUT/REQUESTS/AT_A_TIME, "
                "such as 2048/128/256/64"
            )
        load = Load(*map(int, fields))
        if 0 in (load.num_input, load.num_output, load.num_requests):
            raise ArgumentTypeError(f"{part!r} has a zero; only the last number may be 0")
        found.append(load)
    return found


def measure_serving(
    executor: TorchDecoderExecutor, config: CheckpointConfig, load: Load, ceilings: Ceilings
) -> Row:
    """Submits all requests at once to the executor, which takes as many as its engine does."""
    vocab_size = config.decoder.vocab_size
    for seed in range(load.num_requests):
        prompt = random_prompt(vocab_size, load.num_input, 5000 + seed)
        executor.submit(DecoderRequest(prompt, load.num_output))
    counts: Counter[int] = Counter()
    start = time.perf_counter()
    while outputs := executor.step():
        counts.update(output.request_id for output in outputs)
    seconds = time.perf_counter() - start
    assert list(counts.values()) == [load.num_output] * load.num_requests
    batch_size = min(load.num_requests, executor.limits.max_batch_size)
    return _row("serving", config, load, batch_size, counts.total(), seconds, ceilings)


def measure_served(
    runner: Runner, load: Load, ceilings: Ceilings, first_seed: int, max_step_ms: float = 0.0
) -> Row:
    """Answers the requests through a server, from the first submission to the last answer.

    Where at_a_time is the engine's own limit, all requests are submitted at once and the server
    holds them back. Below it the client does: a new request comes as an old one ends. first_seed:
    loads of other seeds share no prompt. max_step_ms: the decoder's, which the row names.
    """
    limit = runner.engine.limits.max_batch_size
    at_a_time = load.at_a_time or limit
    assert at_a_time <= limit, f"the engine takes {limit} requests at a time"
    num_open = load.num_requests if at_a_time == limit else min(at_a_time, load.num_requests)
    requests = [
        text_request(runner, load.num_input, load.num_output, first_seed + number)
        for number in range(load.num_requests)
    ]
    server = Server(runner, max_queue_size=load.num_requests)
    try:
        num_tokens, seconds = answer_all(server, requests, num_open)
    finally:
        server.close()
    batch_size = min(load.num_requests, at_a_time)
    config = runner.engine.checkpoint_config
    phase = "served" + f", {max_step_ms:g} ms a step" * (max_step_ms > 0.0)
    return _row(phase, config, load, batch_size, num_tokens, seconds, ceilings)


def answer_all(
    server: Server, requests: list[GenerationRequest], num_open: int
) -> tuple[int, float]:
    """Asks all requests, `num_open` at a time. The tokens of the answers, and the seconds from the
    first submission to the last answer."""
    ended: SimpleQueue[Answer] = SimpleQueue()

    def listen(answer: Answer) -> None:
        if answer.is_last:
            ended.put(answer)

    start = time.perf_counter()
    for request in requests[:num_open]:
        server.submit(request, listen)
    num_tokens = 0
    for number in range(len(requests)):
        answer = ended.get()
        if answer.error is not None:
            raise answer.error
        assert answer.result is not None, "the last piece has a result or an error"
        num_tokens += answer.result.num_tokens  # fewer where the model ended its turn
        if num_open + number < len(requests):
            server.submit(requests[num_open + number], listen)
    return num_tokens, time.perf_counter() - start


def _row(
    phase: str,
    config: CheckpointConfig,
    load: Load,
    batch_size: int,
    num_tokens: int,
    seconds: float,
    ceilings: Ceilings,
) -> Row:
    """tokens_per_s counts the answers'; share: of the time that prompts at the FP8 ceiling and
    steps of full batches at the copy rate would take."""
    flop = load.num_requests * prefill_flop(config, load.num_input)
    step_seconds = step_bytes(config, batch_size, load.num_input) / ceilings.copy_bytes_per_s
    least = flop / ceilings.fp8_flop_per_s + num_tokens / batch_size * step_seconds
    return Row(
        phase,
        config.decoder.num_hidden_layers,
        batch_size,
        load.num_input,
        1e3 * seconds,
        num_tokens / seconds,
        flop / seconds,
        least / seconds,
    )
