"""vLLM in FP8 at the same width, with random weights: the same phases. Needs vllm and a GPU.

    python -m bench.peers.vllm_engine [--shape 72b] [--layers 8,16] [--batch_sizes 1,8,64]
        [--context 2048] [--prompts 1948,2048] [--kv_cache_dtype auto] [--tp_size 1]

Weights are quantised by vLLM as it loads them, activations by scales of the moment; CUDA graphs, no
prefix cache, greedy tokens. A decode step is the difference of two `generate` calls over the
difference of their tokens; a prompt is a call for one token, and what vLLM's processes send each
other is in it. All numbers of layers are loaded and measured in turns. With --tp_size vLLM starts a
process for each GPU by itself, without mpirun; rates and shares are then of one GPU. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper.decoder import PAUSE_S, decode_row, prefill_row, random_prompt
from bench.lists import counts
from bench.machine import describe, describe_gpu
from bench.peers.hugging_face import qwen2_config
from bench.report import Report
from bench.rows import Row
from bench.synthetic_engine import DECODERS
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.program.command_line import ArgumentParser, positive_int, run
from nvlm.program.errors import UserError

NUM_STEPS, WARM_UP, REPEATS = 128, 2, 5
MAX_NUM_BATCHED_TOKENS = 8192  # as the synthetic engine's
_MEMORY = 0.9  # of the GPU, for all engines


class Peer:
    """One vLLM engine. It lives in processes of its own, which end with this object."""

    def __init__(
        self, vllm: Any, options: argparse.Namespace, num_layers: int, memory: float, folder: Path
    ) -> None:
        """memory: share of the GPU's. folder: where the model's config.json is written."""
        decoder = replace(DECODERS[options.shape], num_hidden_layers=num_layers)
        is_fp8 = options.kv_cache_dtype == "fp8"
        cache = "FP8" if is_fp8 else None
        self.config = CheckpointConfig(decoder, "bfloat16", "FP8", cache, options.tp_size)
        self._vllm = vllm
        qwen2_config(decoder).save_pretrained(folder)
        self._llm = vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            quantization="fp8",
            kv_cache_dtype=options.kv_cache_dtype,
            max_model_len=max(options.context + NUM_STEPS, *options.prompts) + 1,
            max_num_seqs=max(options.batch_sizes),
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            enable_prefix_caching=False,
            enforce_eager=False,
            gpu_memory_utilization=memory,
            tensor_parallel_size=options.tp_size,
        )

    def seconds(self, batch_size: int, prompt: int, num_tokens: int) -> float:
        """How long `batch_size` requests of `prompt` tokens take to get `num_tokens` more each."""
        vocab_size = self.config.decoder.vocab_size
        prompts = [
            {"prompt_token_ids": random_prompt(vocab_size, prompt, seed)}
            for seed in range(batch_size)
        ]
        sampling = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(answer.outputs[0].token_ids) for answer in answers] == [num_tokens] * batch_size
        return seconds


def measure(
    peers: dict[int, Peer], options: argparse.Namespace, ceilings: Ceilings
) -> Iterator[Row]:
    for num_tokens in options.prompts:
        times: dict[int, list[float]] = {num_layers: [] for num_layers in peers}
        for _ in range(WARM_UP + REPEATS):
            for num_layers, peer in peers.items():
                time.sleep(PAUSE_S)
                times[num_layers].append(peer.seconds(1, num_tokens, 1))
        for num_layers, peer in peers.items():
            seconds = statistics.median(times[num_layers][WARM_UP:])
            yield prefill_row(peer.config, num_tokens, seconds, ceilings.fp8_flop_per_s)
    for batch_size in options.batch_sizes:
        times = {num_layers: [] for num_layers in peers}
        short = _short(batch_size, options.context)
        prompt = options.context - short - NUM_STEPS // 2  # the steps are about the context
        for _ in range(WARM_UP + REPEATS):
            for num_layers, peer in peers.items():
                less = peer.seconds(batch_size, prompt, short)
                more = peer.seconds(batch_size, prompt, short + NUM_STEPS)
                times[num_layers].append((more - less) / NUM_STEPS)
        for num_layers, peer in peers.items():
            seconds = statistics.median(times[num_layers][WARM_UP:])
            yield decode_row(peer.config, batch_size, options.context, seconds, ceilings)


def _short(batch_size: int, context: int) -> int:
    """More tokens than there are steps with prompts: no request ends before the last has begun, so
    calls of two lengths differ by steps of the whole batch alone."""
    return 16 + math.ceil(batch_size * context / MAX_NUM_BATCHED_TOKENS)


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=counts, default="8,16")
    parser.add_argument("--batch_sizes", type=counts, default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", type=counts, default="1948,2048")
    parser.add_argument("--kv_cache_dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--tp_size", type=positive_int, default=1)
    options = parser.parse_args(arguments)
    least = _short(max(options.batch_sizes), options.context) + NUM_STEPS // 2 + 1
    if options.context < least:
        raise UserError(f"--context {options.context} leaves no prompt; give {least} or more")
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(f"vllm cannot be imported ({error}); install it beside torch") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = measure_ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # vLLM wants its share to be free
    # What an engine needs grows with its layers; embedding, head and activations are some 4 more.
    need = {num_layers: num_layers + 4 for num_layers in options.layers}
    share = {num_layers: _MEMORY * need[num_layers] / sum(need.values()) for num_layers in need}
    settings = {"kv_cache_dtype": options.kv_cache_dtype, "tp_size": options.tp_size}
    machine = describe() | describe_gpu(device) | {"vllm": vllm.__version__, **settings}
    report = Report(machine, ceilings)
    with tempfile.TemporaryDirectory() as folder:
        peers = {
            num_layers: Peer(vllm, options, num_layers, memory, Path(folder, str(num_layers)))
            for num_layers, memory in share.items()
        }
        report.show(measure(peers, options, ceilings))
        peers.clear()
        gc.collect()  # whatever vLLM's processes say at their end comes before the JSON
    print(json.dumps(report.to_json()))


if __name__ == "__main__":
    run(main)
