"""Decode and prefill of a loaded engine, through `DecoderExecutor.step`: scheduler and sampling
included, times by the host's clock."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator

import torch

from bench.ceilings import Ceilings
from bench.rows import Row
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.formats.checkpoint_tensors import decoder_tensors
from nvlm.planning.memory_plan import kv_bytes_per_token
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.torch_executor import TorchDecoderExecutor

_WARM_UP = 3
PAUSE_S = 0.3 if torch.cuda.is_available() else 0.0
"""Before a prompt that finds the GPU idle, as a single user's does; without pauses its clock falls
under the power of large products."""

Executors = dict[int, tuple[TorchDecoderExecutor, CheckpointConfig]]
"""By number of layers. They are measured in turns, so that what changes meanwhile (clocks,
temperature) is in all of them and not in their differences."""


def random_prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """No two of other seeds or lengths share a prefix, whose blocks would not be computed again."""
    generator = torch.Generator().manual_seed(1_000_003 * num_tokens + seed)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


def measure_decode(
    executors: Executors,
    batch_size: int,
    context: int,
    ceilings: Ceilings,
    num_rounds: int = 5,
    steps_a_round: int = 12,
) -> Iterator[Row]:
    """Steps in which `batch_size` requests decode at `context` tokens, give or take a round."""
    num_steps = num_rounds * (_WARM_UP + steps_a_round)
    requests = {}
    for num_layers, (executor, config) in executors.items():
        prompts = [
            random_prompt(config.decoder.vocab_size, context - num_steps // 2, seed)
            for seed in range(batch_size)
        ]
        requests[num_layers] = [
            executor.submit(DecoderRequest(prompt, 2 * context)) for prompt in prompts
        ]
        while len(executor.step()) < batch_size:  # prompts, as many a step as it takes
            pass
    times: dict[int, list[float]] = {num_layers: [] for num_layers in executors}
    for _ in range(num_rounds):
        for num_layers, (executor, _) in executors.items():
            for step in range(_WARM_UP + steps_a_round):
                start = time.perf_counter()
                assert len(executor.step()) == batch_size
                if step >= _WARM_UP:
                    times[num_layers].append(time.perf_counter() - start)
    for num_layers, (executor, config) in executors.items():
        for request in requests[num_layers]:
            executor.cancel(request)
        seconds = statistics.median(times[num_layers])
        yield decode_row(config, batch_size, context, seconds, ceilings)


def measure_prefill(
    executors: Executors,
    num_tokens: int,
    ceilings: Ceilings,
    repeats: int = 12,
    *,
    is_new: bool = False,
    is_busy: bool = False,
) -> Iterator[Row]:
    """One prompt, whose first token comes in one step. is_new: each of a length of its own.
    is_busy: one right after the other, instead of after a pause."""
    times: dict[int, list[float]] = {num_layers: [] for num_layers in executors}
    prompts = itertools.count(1_000_000 * is_new + 2_000_000 * is_busy)

    def measure(executor: TorchDecoderExecutor, vocab_size: int, length: int) -> float:
        reused = executor.scheduler.num_reused_tokens
        prompt = random_prompt(vocab_size, length, next(prompts))
        executor.submit(DecoderRequest(prompt, 1))
        if not is_busy:
            time.sleep(PAUSE_S)
        start = time.perf_counter()
        assert len(executor.step()) == 1
        seconds = time.perf_counter() - start
        assert executor.scheduler.num_reused_tokens == reused, "a prompt was there before"
        return seconds

    turns = 1 if is_busy else repeats  # how often the executors alternate
    for turn in range(turns):
        for num_layers, (executor, config) in executors.items():
            for repeat in range(repeats // turns):
                length = num_tokens - 2 * (turn + repeat) - 1 if is_new else num_tokens
                seconds = measure(executor, config.decoder.vocab_size, length)
                times[num_layers].append(seconds)
    for num_layers, (_, config) in executors.items():
        seconds = statistics.median(times[num_layers][2:])
        phase = "prefill" + ", new" * is_new + ", busy" * is_busy
        yield prefill_row(config, num_tokens, seconds, ceilings.fp8_flop_per_s, phase)


def decode_row(
    config: CheckpointConfig,
    batch_size: int,
    context: int,
    seconds: float,
    ceilings: Ceilings,
    phase: str = "decode",
) -> Row:
    moved = step_bytes(config, batch_size, context)
    return Row(
        phase,
        config.decoder.num_hidden_layers,
        batch_size,
        context,
        1e3 * seconds,
        batch_size / seconds,
        moved / seconds,
        moved / seconds / ceilings.copy_bytes_per_s,
    )


def prefill_row(
    config: CheckpointConfig,
    num_tokens: int,
    seconds: float,
    flop_per_s: float,
    phase: str = "prefill",
) -> Row:
    """flop_per_s: the ceiling."""
    flop = prefill_flop(config, num_tokens)
    return Row(
        phase,
        config.decoder.num_hidden_layers,
        1,
        num_tokens,
        1e3 * seconds,
        num_tokens / seconds,
        flop / seconds,
        flop / seconds / flop_per_s,
    )


def step_bytes(config: CheckpointConfig, batch_size: int, context: int) -> int:
    """Read once in a decode step by a rank: every weight but the embedding, and the requests' keys
    and values."""
    weights = sum(
        info.num_bytes
        for name, info in decoder_tensors(config).items()
        if "vocab_embedding" not in name
    )
    return weights + batch_size * context * kv_bytes_per_token(config)


def prefill_flop(config: CheckpointConfig, num_tokens: int) -> float:
    """Linears of all tokens and causal attention, of one rank; the head is one token's."""
    decoder = config.decoder
    linears = sum(
        2.0 * num_tokens * info.shape[0] * info.shape[1]
        for name, info in decoder_tensors(config).items()
        if name.startswith("transformer.layers") and len(info.shape) == 2
    )
    attention = 2.0 * num_tokens**2 * decoder.hidden_size * decoder.num_hidden_layers
    return linears + attention / config.tp_size
