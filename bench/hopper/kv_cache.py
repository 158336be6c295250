"""Decode steps and prompts with keys and values in bfloat16, beside FP8, over the same weights.

    python -m bench.hopper.kv_cache [--shape 72b] [--layers 80] [--batch_sizes 1,8,64]
        [--context 2048] [--prompts 1948] [--rounds 2]

The weights are loaded once; caches and graphs, which do not fit beside each other, are made anew in
turns. Every step goes through the executor. On a CPU the plain forms run. The last lines are the
ratios, and JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper.decoder import measure_decode, measure_prefill
from bench.hopper.device import device_for
from bench.lists import counts
from bench.machine import describe, describe_gpu
from bench.rows import Row
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from nvlm.formats.kv_cache import AS_STORED, EngineKVCache
from nvlm.program.process import set_up_cublas
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.hopper_weights import HopperWeights, load_hopper_weights
from runtime.decoder.models.open_model import OpenedModel
from runtime.decoder.scheduler import max_num_blocks
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir

CACHES = {"FP8": AS_STORED, "bfloat16": EngineKVCache(in_dtype=True)}
_ROOM = 512 + 64  # positions beyond a context: the answers of a measurement


def with_cache(
    engine: EngineDir, weights: HopperWeights, name: str
) -> tuple[EngineDir, HopperWeights]:
    """The engine and the weights as a build with this KV cache has them."""
    config = replace(engine.checkpoint_config, kv_cache=CACHES[name])
    if CACHES[name].in_dtype:
        layers = [replace(layer, kv_scales=None) for layer in weights.layers]
        weights = replace(weights, layers=layers)
    return replace(engine, checkpoint_config=config), weights


def opened(engine: EngineDir, weights: HopperWeights, device: torch.device) -> TorchDecoderExecutor:
    """All blocks that the limits can use, and graphs on a GPU."""
    limits, forms = engine.limits, PlainForms()
    if device.type == "cuda":
        from runtime.decoder.kernels.triton_forms import TritonForms

        forms = TritonForms(device)
    num_blocks = max_num_blocks(limits)
    model = HopperModel(
        engine.checkpoint_config,
        *(limits.max_batch_size, limits.max_seq_len, weights, num_blocks, device, forms),
    )
    model.warm_up(limits.max_num_tokens, use_graphs=device.type == "cuda")
    return TorchDecoderExecutor.over(engine, OpenedModel(model, num_blocks))


def measured(
    executor: TorchDecoderExecutor,
    engine: EngineDir,
    options: argparse.Namespace,
    ceilings: Ceilings,
) -> Iterator[Row]:
    config = engine.checkpoint_config
    executors = {config.decoder.num_hidden_layers: (executor, config)}
    for batch_size in options.batch_sizes:
        yield from measure_decode(executors, batch_size, options.context, ceilings)
    for num_tokens in options.prompts:
        yield from measure_prefill(executors, num_tokens, ceilings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--batch_sizes", type=counts, default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", type=counts, default="1948")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    set_up_cublas(os.environ)
    device = device_for(options.shape, parser)
    ceilings = measure_ceilings(device)
    longest = max(options.context, *options.prompts)
    engine = synthetic_engine(
        options.shape,
        options.layers,
        max_batch_size=max(options.batch_sizes),
        max_seq_len=longest + _ROOM,
    )
    source = decoder_source(engine, device)
    weights = load_hopper_weights(source, engine.checkpoint_config, device)
    times: dict[tuple[str, int, int], dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name in CACHES:
            own_engine, own_weights = with_cache(engine, weights, name)
            executor = opened(own_engine, own_weights, device)
            for row in measured(executor, own_engine, options, ceilings):
                print(f"KV cache {name:<9} {row}", flush=True)
                key = row.phase, row.batch_size, row.num_tokens
                times.setdefault(key, {}).setdefault(name, []).append(row.ms)
            executor.close()
            del executor
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    rows = []
    for (phase, batch_size, num_tokens), of in times.items():
        ms = {name: statistics.median(each) for name, each in of.items()}
        ratio = ms["bfloat16"] / ms["FP8"]
        print(f"{phase}, batch {batch_size}, {num_tokens} tokens: bfloat16 {ratio:.3f} times FP8")
        rows.append(
            {
                "phase": phase,
                "batch_size": batch_size,
                "num_tokens": num_tokens,
                "ms": ms,
                "ms_of_rounds": of,
                "bfloat16_over_fp8": ratio,
            }
        )
    machine = describe() | describe_gpu(device)
    print(json.dumps({"machine": machine, "layers": options.layers, "kv_cache": rows}))


if __name__ == "__main__":
    main()
