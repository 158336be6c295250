"""Hugging Face transformers in bfloat16 at the same width, with random weights: the same phases.

    python -m bench.peers.hugging_face [--shape 72b] [--layers 4,8] [--batch_sizes 1,8]

Eager modules, SDPA attention, a growing cache, greedy tokens: `forward` called as `generate` does.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import transformers

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper.decoder import PAUSE_S, decode_row, prefill_row, random_prompt
from bench.lists import counts
from bench.machine import describe, describe_gpu
from bench.report import Report
from bench.rows import Row
from bench.stopwatch import seconds_of
from bench.synthetic_engine import DECODERS
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.model.config import DecoderConfig

NUM_STEPS, WARM_UP = 20, 3


def qwen2_config(decoder: DecoderConfig) -> transformers.Qwen2Config:
    return transformers.Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=decoder.hidden_size,
        intermediate_size=decoder.intermediate_size,
        num_hidden_layers=decoder.num_hidden_layers,
        num_attention_heads=decoder.num_attention_heads,
        num_key_value_heads=decoder.num_key_value_heads,
        vocab_size=decoder.vocab_size,
        max_position_embeddings=decoder.max_position_embeddings,
        rms_norm_eps=decoder.rms_norm_eps,
        tie_word_embeddings=False,
    )


def qwen2(decoder: DecoderConfig, device: torch.device) -> Any:
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model: Any = transformers.Qwen2ForCausalLM(qwen2_config(decoder))
        return model.eval()
    finally:
        torch.set_default_dtype(kept)


Models = dict[int, tuple[Any, CheckpointConfig]]
"""By number of layers: the model, and what our checkpoint of it would hold."""


def token_ids(stored: CheckpointConfig, batch_size: int, num_tokens: int) -> torch.Tensor:
    vocab_size = stored.decoder.vocab_size
    return torch.tensor([random_prompt(vocab_size, num_tokens, i) for i in range(batch_size)])


@torch.inference_mode()
def measure_prefill(
    models: Models, num_tokens: int, ceilings: Ceilings, device: torch.device
) -> Iterator[Row]:
    times: dict[int, list[float]] = {num_layers: [] for num_layers in models}
    for _ in range(7):
        for num_layers, (model, stored) in models.items():
            ids = token_ids(stored, 1, num_tokens).to(device)
            time.sleep(PAUSE_S)
            work = lambda: model(ids, logits_to_keep=1).logits.argmax(-1).tolist()  # noqa: B023, E731
            times[num_layers].append(seconds_of(work, device))
    for num_layers, (_, stored) in models.items():
        seconds = statistics.median(times[num_layers][2:])
        yield prefill_row(stored, num_tokens, seconds, ceilings.bf16_flop_per_s)


@torch.inference_mode()
def measure_decode(
    models: Models, batch_size: int, context: int, ceilings: Ceilings, device: torch.device
) -> Iterator[Row]:
    """The second time: the first plans attention for every length of the cache, 11 ms each."""
    for _ in range(2):
        times = _step_times(models, batch_size, context, device)
    for num_layers, (_, stored) in models.items():
        seconds = statistics.median(times[num_layers][1 + WARM_UP :])
        yield decode_row(stored, batch_size, context, seconds, ceilings)


def _step_times(
    models: Models, batch_size: int, context: int, device: torch.device
) -> dict[int, list[float]]:
    """Times of the prompt and of each step after it, by number of layers."""
    times: dict[int, list[float]] = {num_layers: [] for num_layers in models}
    caches = {num_layers: transformers.DynamicCache() for num_layers in models}
    ids = {
        num_layers: token_ids(stored, batch_size, context).to(device)
        for num_layers, (_, stored) in models.items()
    }
    for _ in range(1 + WARM_UP + NUM_STEPS):
        for num_layers, (model, _) in models.items():
            start = time.perf_counter()
            logits = model(
                ids[num_layers],
                past_key_values=caches[num_layers],
                use_cache=True,
                logits_to_keep=1,
            ).logits
            ids[num_layers] = logits[:, -1:].argmax(-1)
            ids[num_layers].tolist()
            times[num_layers].append(time.perf_counter() - start)
    return times


def measure(options: argparse.Namespace, ceilings: Ceilings, device: torch.device) -> Iterator[Row]:
    """All numbers of layers in turns."""
    models: Models = {}
    for num_layers in options.layers:
        decoder = replace(DECODERS[options.shape], num_hidden_layers=num_layers)
        stored = CheckpointConfig(decoder, "bfloat16", None, None)
        models[num_layers] = qwen2(decoder, device), stored
    for num_tokens in options.prompts:
        yield from measure_prefill(models, num_tokens, ceilings, device)
    for batch_size in options.batch_sizes:
        yield from measure_decode(models, batch_size, options.context, ceilings, device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=counts, default="4,8")
    parser.add_argument("--batch_sizes", type=counts, default="1,8")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", type=counts, default="1948,2048")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    version = {"transformers": transformers.__version__}
    report = Report(describe() | describe_gpu(device) | version, ceilings)
    report.show(measure(options, ceilings, device))
    print(json.dumps(report.to_json()))


if __name__ == "__main__":
    main()
