"""The sum over ranks alone, with residual, RMSNorm and quantise: by peer memory beside NCCL.

    mpirun -n 2 python -m bench.ranks.sums [--shape 72b] [--num_rows 1,8,16,32,64,256,1948]

As many as a token of 80 layers needs follow one another in a CUDA graph, of the objects that the
decoder has for them (runtime/decoder/models/all_reduce_norm.py); only the product before each is
left out, its part of the sum is there already. Peer memory is measured as it chooses and both ways,
one shot and two. The floor is what a rank has to read of the others', at the rate of a copy from
another GPU in the same run. On CPUs gloo runs, which only shows that the program works. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from bench.ceilings import peer_copy_rate
from bench.lists import counts
from bench.machine import describe, describe_gpu
from bench.synthetic_engine import DECODERS, synthetic_engine
from nvlm.model.number_formats import fp8
from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError
from nvlm.program.launcher import World, end, rank_from
from nvlm.program.process import set_up_cublas, set_up_nccl
from runtime.decoder.kernels.operands import Norm
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import AllReduceNorm, CollectiveAllReduceNorm
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.ranks import peer_all_reduce_norm
from runtime.ranks.mpi import Job
from runtime.ranks.peer_all_reduce_norm import PeerAllReduceNorm
from runtime.ranks.peer_memory import PeerMemory
from runtime.ranks.process_group import ProcessGroup

NUM_SUMS = 160
_NUM_REPLAYS, _WARM_UP = 12, 3
# Rows up to which peer memory takes one shot: all or none, or as it says itself.
WAYS = {"peer": None, "peer, one shot": 1 << 30, "peer, two shots": 0}


@contextmanager
def without_product(forms: PlainForms, part: torch.Tensor) -> Iterator[PlainForms]:
    """Forms whose linears are done already. part: float32 [rows, hidden_size], zeros."""

    def linear(
        x: torch.Tensor, _: Fp8Linear, __: torch.dtype, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return part[: len(x)] if out is None else out

    with patch.object(forms, "linear", linear):
        yield forms


def forms_on(device: torch.device) -> PlainForms:
    if device.type == "cpu":
        return PlainForms()
    from runtime.decoder.kernels.triton_forms import TritonForms

    return TritonForms(device)


class Measuring:
    """Times sums of one width, the same on all ranks at once. max_rows: of a sum."""

    def __init__(self, group: ProcessGroup, hidden_size: int, max_rows: int) -> None:
        device = group.device
        self._group = group
        self._hidden = torch.zeros(max_rows, hidden_size, dtype=torch.bfloat16, device=device)
        self._input = torch.zeros(max_rows, 16, device=device).to(fp8.E4M3)
        one = torch.ones((), device=device)
        weight = torch.zeros(hidden_size, 16, device=device).to(fp8.E4M3)
        self._linear, self._scale = Fp8Linear(weight, one, one), one
        self._norm = Norm(torch.ones(hidden_size, dtype=torch.bfloat16, device=device), 1e-6)

    def microseconds(self, sums: AllReduceNorm, num_rows: int) -> float:
        """Collective. Of one, in a row of `NUM_SUMS`."""

        def work() -> None:
            for _ in range(NUM_SUMS):
                sums.linear_add_rms_norm(
                    self._input[:num_rows],
                    self._linear,
                    self._hidden[:num_rows],
                    self._norm,
                    self._scale,
                )

        times = self._replayed(work) if self._group.device.type == "cuda" else self._timed(work)
        return 1e6 * statistics.median(times) / NUM_SUMS

    def _timed(self, work: Callable[[], None]) -> list[float]:
        self._group.job.gather(None)
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]

    def _replayed(self, work: Callable[[], None]) -> list[float]:
        work()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        times = []
        for _ in range(_NUM_REPLAYS):
            self._group.job.gather(None)
            begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            finish.record()
            finish.synchronize()
            times.append(begin.elapsed_time(finish) / 1e3)
        return times[_WARM_UP:]


@torch.inference_mode()
def measure(
    options: argparse.Namespace, group: ProcessGroup, copy_bytes_per_s: float | None
) -> list[dict[str, Any]]:
    """Collective. A row for every number of rows, in microseconds; the leader prints each."""
    device, row_counts = group.device, options.num_rows
    engine = synthetic_engine(
        options.shape, 1, max_batch_size=1, max_seq_len=max(row_counts) + 64, tp_size=group.size
    )
    hidden_size = engine.checkpoint_config.decoder.hidden_size
    measuring = Measuring(group, hidden_size, max(row_counts))
    memory, rows = PeerMemory.open(engine, device, group), []
    part = torch.zeros(max(row_counts), hidden_size, device=device)
    with without_product(forms_on(device), part) as forms:
        for num_rows in row_counts:
            row: dict[str, Any] = {"num_rows": num_rows, "us": {}}
            collective = CollectiveAllReduceNorm(forms, group.all_reduce)
            row["us"]["all-reduce"] = measuring.microseconds(collective, num_rows)
            for name, most in WAYS.items() if memory is not None else ():
                chosen = peer_all_reduce_norm.ONE_SHOT_ROWS if most is None else most
                assert memory is not None
                with patch.object(peer_all_reduce_norm, "ONE_SHOT_ROWS", chosen):
                    peer = PeerAllReduceNorm(memory, forms)
                    row["us"][name] = measuring.microseconds(peer, num_rows)
            if copy_bytes_per_s is not None:
                read = 4 * num_rows * hidden_size * (group.size - 1)
                row["us"]["floor of one shot"] = 1e6 * read / copy_bytes_per_s
            rows.append(row)
            if group.rank == 0:
                times = ", ".join(f"{name} {us:.2f}" for name, us in row["us"].items())
                print(f"{num_rows:>5} rows, us: {times}", flush=True)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=DECODERS, default="72b")
    parser.add_argument("--num_rows", type=counts, default="1,8,16,32,64,256,1948")
    world = World.from_environment(os.environ)
    if world.size == 1:
        raise UserError("one rank is running, which has no sums; use mpirun -n 2")
    set_up_cublas(os.environ)
    set_up_nccl(os.environ)
    with Job(world) as job:
        options = job.agree(lambda: parser.parse_args(arguments))
        device = job.device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        rate = job.broadcast(peer_copy_rate() if world.rank == 0 else None)
        group = ProcessGroup(job, device)
        rows = measure(options, group, rate)
        if group.rank > 0:
            group.follow()
            return
        group.close()
        machine = describe() | describe_gpu(device) | {"tp_size": group.size}
        print(json.dumps({"machine": machine, "peer_copy_bytes_per_s": rate, "rows": rows}))


if __name__ == "__main__":
    run(main, rank=rank_from(os.environ), end=end)
