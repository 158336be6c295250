"""Decode and prefill on tensor parallel ranks, beside one rank on the same GPUs.

    mpirun -n 2 python -m bench.ranks.hopper --output FILE [--shape 72b] [--layers 80]
        [--batch_sizes 1,8,64] [--context 2048] [--prompts 1948] [--no_graphs] [--one_shot]

Every rank makes its own random shards (bench/synthetic_engine.py). `--one FILE` names the
JSON of bench.hopper on one of these GPUs, to divide by. The output is written after every row,
so that a hang loses only itself.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings, measure_ceilings
from bench.hopper.decoder import measure_decode, measure_prefill
from bench.hopper.measure import numbers
from bench.machine import describe, describe_gpu
from bench.rows import Row
from bench.synthetic_engine import DECODERS, decoder_source, synthetic_engine
from nvlm.program import command_line
from nvlm.program.json_files import write_json_atomically
from nvlm.program.launcher import World, end, rank_from
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.ranks.mpi import Job
from runtime.ranks.parallel_decoder import open_parallel_model
from runtime.ranks.process_group import ProcessGroup


def opened(
    options: argparse.Namespace, device: torch.device, group: ProcessGroup
) -> TorchDecoderExecutor:
    prompts = numbers(options.prompts)
    engine = synthetic_engine(
        options.shape,
        options.layers,
        max_batch_size=max(numbers(options.batch_sizes)),
        max_seq_len=max(options.context + 512, *prompts) + 64,
        tp_size=group.size,
    )
    source = decoder_source(engine, device, group.rank)
    model = open_parallel_model(engine, device, group, source, use_graphs=not options.no_graphs)
    return TorchDecoderExecutor.over(engine, model)


def measure(
    options: argparse.Namespace, executor: TorchDecoderExecutor, found: dict[str, Any]
) -> None:
    config = synthetic_engine(
        options.shape, options.layers, max_batch_size=1, max_seq_len=64, tp_size=found["tp_size"]
    ).checkpoint_config
    ceilings = Ceilings(**found["ceilings"])
    one = {} if options.one is None else step_times(options.one, options.layers)

    def tell(row: Row) -> None:
        key = (row.phase, row.batch_size, row.num_tokens)
        speed_up = one[key] / row.ms if key in one else None
        found["rows"].append(row.to_json() | {"speed_up": speed_up})
        print(row, "" if speed_up is None else f"{speed_up:.2f} times one", flush=True)
        write_json_atomically(options.output, found)

    executors = {options.layers: (executor, config)}
    for batch_size in numbers(options.batch_sizes):
        for row in measure_decode(executors, batch_size, options.context, ceilings):
            tell(row)
    for num_tokens in numbers(options.prompts):
        for row in measure_prefill(executors, num_tokens, ceilings):
            tell(row)


def step_times(path: Path, num_layers: int) -> dict[tuple[str, int, int], float]:
    """Milliseconds of one rank's rows, of the last line of bench/hopper/measure.py's output."""
    rows = json.loads(path.read_text().splitlines()[-1])["rows"]
    return {
        (row["phase"], row["batch_size"], row["num_tokens"]): row["ms"]
        for row in rows
        if row["num_layers"] == num_layers
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--one", type=Path, help="what bench/hopper/measure.py printed for one GPU")
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--batch_sizes", default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", default="1948")
    parser.add_argument("--no_graphs", action="store_true")
    parser.add_argument("--one_shot", action="store_true", help="small sums by peer memory")
    options = parser.parse_args()
    set_up_cublas(os.environ)
    set_up_nccl(os.environ)
    kind = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with Job(World.from_environment(os.environ)) as job:
        device = job.device(kind)
        group = ProcessGroup(job, device)
        if options.one_shot:
            group.share_memory(4 * 64 * DECODERS[options.shape].hidden_size)
        ceilings = measure_ceilings(device)
        start = time.perf_counter()
        executor = opened(options, device, group)
        if group.rank > 0:
            group.follow()
            return
        executor.warm_up()
        found: dict[str, Any] = {
            "machine": describe() | describe_gpu(device),
            "tp_size": group.size,
            "has_graphs": not options.no_graphs,
            "one_shot": options.one_shot,
            "load_s": time.perf_counter() - start,
            "ceilings": ceilings.to_json(),
            "rows": [],
        }
        print(f"{options.layers} layers are ready after {found['load_s']:.1f} s", flush=True)
        measure(options, executor, found)
        executor.close()


if __name__ == "__main__":
    command_line.run(main, rank=rank_from(os.environ), end=end)
