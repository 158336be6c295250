"""Decode and prefill of a loaded engine, through `DecoderExecutor.step`: scheduler and sampling
included, times by the host's clock."""

from __future__ import annotations

import statistics
import time

import torch

from bench.ceilings import Ceilings
from bench.hopper_row import Row
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.checkpoint_tensors import decoder_tensors
from nvlm.plan import kv_bytes_per_token
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.torch_executor import TorchDecoderExecutor

_WARM_UP = 3


def random_prompt(vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    """No two of other seeds or lengths share a prefix, whose blocks would not be computed again."""
    generator = torch.Generator().manual_seed(1_000_003 * num_tokens + seed)
    return torch.randint(vocab_size, (num_tokens,), generator=generator).tolist()


def measure_decode(
    executor: TorchDecoderExecutor,
    config: CheckpointConfig,
    batch_size: int,
    context: int,
    ceilings: Ceilings,
    num_steps: int = 40,
) -> Row:
    """Steps in which `batch_size` requests decode at `context` tokens, give or take `num_steps`."""
    vocab_size = config.decoder.vocab_size
    requests = [
        executor.submit(
            DecoderRequest(random_prompt(vocab_size, context - num_steps, seed), 2 * context)
        )
        for seed in range(batch_size)
    ]
    while len(executor.step()) < batch_size:  # prompts, as many a step as it takes
        pass
    times = []
    for _ in range(_WARM_UP + num_steps):
        start = time.perf_counter()
        assert len(executor.step()) == batch_size
        times.append(time.perf_counter() - start)
    for request in requests:
        executor.cancel(request)
    seconds = statistics.median(times[_WARM_UP:])
    moved = step_bytes(config, batch_size, context)
    return Row(
        "decode",
        config.decoder.num_hidden_layers,
        batch_size,
        context,
        1e3 * seconds,
        batch_size / seconds,
        moved / seconds,
        moved / seconds / ceilings.copy_bytes_per_s,
    )


def measure_prefill(
    executor: TorchDecoderExecutor,
    config: CheckpointConfig,
    num_tokens: int,
    ceilings: Ceilings,
    repeats: int = 8,
    *,
    is_new: bool = False,
) -> Row:
    """One prompt, whose first token comes in one step. `is_new`: each of a length of its own."""
    times = []
    num_reused = executor.scheduler.num_reused_tokens
    for repeat in range(2 + repeats):
        length = num_tokens - 2 * repeat - 1 if is_new else num_tokens
        prompt = random_prompt(config.decoder.vocab_size, length, 1000 + repeat)
        executor.submit(DecoderRequest(prompt, 1))
        start = time.perf_counter()
        assert len(executor.step()) == 1
        times.append(time.perf_counter() - start)
    assert executor.scheduler.num_reused_tokens == num_reused, "a prompt was there before"
    seconds = statistics.median(times[2:])
    flop = prefill_flop(config, num_tokens)
    return Row(
        "prefill, new" if is_new else "prefill",
        config.decoder.num_hidden_layers,
        1,
        num_tokens,
        1e3 * seconds,
        num_tokens / seconds,
        flop / seconds,
        flop / seconds / ceilings.fp8_flop_per_s,
    )


def step_bytes(config: CheckpointConfig, batch_size: int, context: int) -> int:
    """Read once in a decode step: every weight but the embedding, and the requests' keys and
    values."""
    weights = sum(
        info.num_bytes
        for name, info in decoder_tensors(config).items()
        if "vocab_embedding" not in name
    )
    return weights + batch_size * context * kv_bytes_per_token(config)


def prefill_flop(config: CheckpointConfig, num_tokens: int) -> float:
    """Linears of all tokens and causal attention; the head is one token's."""
    decoder = config.decoder
    linears = sum(
        2.0 * num_tokens * info.shape[0] * info.shape[1]
        for name, info in decoder_tensors(config).items()
        if name.startswith("transformer.layers") and len(info.shape) == 2
    )
    attention = 2.0 * num_tokens**2 * decoder.hidden_size * decoder.num_hidden_layers
    return linears + attention
