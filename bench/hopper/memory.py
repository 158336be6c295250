"""GPU memory of an engine from its loading to its fullest step, beside the plan.

    python -m bench.hopper.memory [--shape 72b] [--layers 16] [--max_batch_size 8]
        [--max_seq_len 3944] [--max_num_tokens 8192] [--vision_precision FP8]

A synthetic engine is loaded in the product's order: vision, its graphs, decoder. Then come passes
of every number of tiles and steps of as many prompt tokens and requests as it takes. The last line
is JSON.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.hopper.decoder import random_prompt
from bench.hopper.parts import load_vision
from bench.hopper.vision import random_tiles
from bench.machine import describe, describe_gpu
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from nvlm.planning.device_memory import total_memory_bytes
from nvlm.planning.memory_plan import EnginePlan, plan_engine
from nvlm.program.command_line import ArgumentParser, positive_int, run
from nvlm.program.errors import UserError
from nvlm.program.process import set_up_cublas
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.models.open_model import open_model
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.engine.engine_dir import EngineDir


@dataclass(frozen=True, slots=True)
class Stage:
    """What is held after it, in bytes. used_bytes: of the GPU, by the driver's count; torch holds
    peak_bytes of them in tensors at its most, and reserves reserved_bytes for them."""

    name: str
    seconds: float
    peak_bytes: int
    reserved_bytes: int
    used_bytes: int

    def __str__(self) -> str:
        sizes = self.peak_bytes, self.reserved_bytes, self.used_bytes
        columns = "".join(f"{size / 1e9:9.3f} GB" for size in sizes)
        return f"{self.name:<16}{self.seconds:7.1f} s{columns}"


def measure(engine: EngineDir, device: torch.device) -> tuple[list[Stage], int]:
    """Tells the stages as they come; also how many tokens the KV cache holds."""
    before, start, stages = _used(device), time.perf_counter(), []

    def stage(name: str) -> None:
        nonlocal start
        torch.cuda.synchronize(device)
        found = Stage(
            name,
            time.perf_counter() - start,
            torch.cuda.max_memory_allocated(device),
            torch.cuda.memory_reserved(device),
            _used(device) - before,
        )
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        print(found, flush=True)
        stages.append(found)

    (torch.ones(256, 256, device=device) @ torch.ones(256, 256, device=device)).sum().item()
    stage("CUDA")
    vision = load_vision(engine, engine.vision_precision, device)
    stage("vision")
    vision.warm_up()
    stage("its graphs")
    opened = open_model(engine, device, decoder_source(engine, device))
    executor = TorchDecoderExecutor.over(engine, opened)
    stage("decoder")
    torch.cuda.empty_cache()  # what making random weights took, and reading a file does not
    for num_tiles in range(1, vision.max_num_tiles + 1):
        vision.encode(random_tiles(engine.vision_config, num_tiles, seed=num_tiles))
    stage("tiles")
    limits, vocab_size = engine.limits, engine.checkpoint_config.decoder.vocab_size
    short = max(1, limits.max_num_tokens // limits.max_batch_size)  # all of a batch in one step
    num_long = 1 + -(-limits.max_num_tokens // limits.max_input_len)
    counts = [short] * limits.max_batch_size + [limits.max_input_len] * num_long
    for seed, count in enumerate(counts):
        executor.submit(DecoderRequest(random_prompt(vocab_size, count, seed), 4))
    while executor.step():
        pass
    stage("full steps")
    return stages, TOKENS_PER_BLOCK * executor.scheduler.num_free_blocks


def _used(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _plan_lines(plan: EnginePlan, stages: list[Stage], num_tokens: int) -> list[str]:
    weights = plan.decoder_weight_bytes + plan.vision_weight_bytes
    rest = stages[-1].used_bytes - weights - num_tokens * plan.kv_bytes_per_token
    planned = plan.workspace_bytes + plan.prompt_table_bytes
    return [
        *plan.lines(),
        f"KV cache of {num_tokens:,} tokens",
        f"beyond weights and cache: {rest / 1e9:.3f} GB used, {planned / 1e9:.3f} GB planned",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=positive_int, default=16)
    parser.add_argument("--max_batch_size", type=positive_int, default=8)
    parser.add_argument("--max_seq_len", type=positive_int, default=3944)
    parser.add_argument("--max_num_tokens", type=positive_int, default=8192)
    parser.add_argument("--vision_precision", choices=("bfloat16", "FP8"), default="FP8")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise UserError("torch sees no CUDA GPU, whose memory this measures; run it on one")
    set_up_cublas(os.environ)
    device = torch.device("cuda")
    engine = synthetic_engine(
        options.shape,
        options.layers,
        max_batch_size=options.max_batch_size,
        max_seq_len=options.max_seq_len,
        max_num_tokens=options.max_num_tokens,
        vision_precision=options.vision_precision,
    )
    plan = plan_engine(
        engine.checkpoint_config,
        engine.vision_config,
        engine.vision_precision,
        engine.limits,
        device,
        total_memory_bytes(device),
    )
    print(f"{'':<25}{'peak':>10}{'reserved':>12}{'used':>12}")
    stages, num_tokens = measure(engine, device)
    print("\n".join(_plan_lines(plan, stages, num_tokens)))
    found: dict[str, Any] = {
        "machine": describe() | describe_gpu(device),
        "plan": plan.to_json(),
        "kv_cache_tokens": num_tokens,
        "stages": [asdict(stage) for stage in stages],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
