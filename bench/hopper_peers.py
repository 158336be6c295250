"""Hugging Face transformers in bfloat16 at the same width, with random weights: the same phases.

    python -m bench.hopper_peers [--shape 72b] [--layers 4,8] [--batch_sizes 1,8]

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
from bench.hopper import numbers, slopes, told
from bench.hopper_decoder import PAUSE_S, decode_row, prefill_row, random_prompt
from bench.hopper_row import Row
from bench.machine import describe, describe_gpu
from bench.stopwatch import seconds_of
from bench.synthetic_engine import DECODERS
from nvlm.checkpoint_config import CheckpointConfig
from nvlm.config import DecoderConfig

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


@torch.inference_mode()
def measure(
    decoder: DecoderConfig, options: argparse.Namespace, ceilings: Ceilings, device: torch.device
) -> Iterator[Row]:
    model = qwen2(decoder, device)
    stored = CheckpointConfig(decoder, "bfloat16", None, None)

    def prompts(batch_size: int, num_tokens: int) -> torch.Tensor:
        rows = [random_prompt(decoder.vocab_size, num_tokens, seed) for seed in range(batch_size)]
        return torch.tensor(rows, device=device)

    for num_tokens in numbers(options.prompts):
        ids = prompts(1, num_tokens)
        work = lambda ids=ids: model(ids, logits_to_keep=1).logits.argmax(-1).tolist()  # noqa: E731
        times = []
        for _ in range(7):
            time.sleep(PAUSE_S)
            times.append(seconds_of(work, device))
        seconds = statistics.median(times[2:])
        yield prefill_row(stored, num_tokens, seconds, ceilings.bf16_flop_per_s)
    for batch_size in numbers(options.batch_sizes):
        cache = transformers.DynamicCache()
        ids = prompts(batch_size, options.context)
        times = []
        for _ in range(1 + WARM_UP + NUM_STEPS):
            start = time.perf_counter()
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            ids.tolist()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times[1 + WARM_UP :])
        yield decode_row(stored, batch_size, options.context, seconds, ceilings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", default="4,8")
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", default="1948,2048")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)

    def measured(num_layers: int) -> Iterator[Row]:
        decoder = replace(DECODERS[options.shape], num_hidden_layers=num_layers)
        return measure(decoder, options, ceilings, device)

    rows = told(row for num_layers in numbers(options.layers) for row in measured(num_layers))
    found = {
        "machine": describe() | describe_gpu(device) | {"transformers": transformers.__version__},
        "ceilings": ceilings.to_json(),
        "rows": [row.to_json() for row in rows],
        "slopes": slopes(rows),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
