"""Decode attention on a Hopper GPU, divided and compiled in many ways: which `Step` is fastest.

    python -m bench.hopper.attention [--kv_heads 8,4] [--batch_sizes 1,8,64] [--context 2048]
        [--num_best 6]

kv_heads: of a rank; 72B has 8, so 4 are those of two ranks. Eight query heads share each. Times are
medians of CUDA graph replays over caches larger than the second level of cache. `step_for` in
runtime/decoder/kernels/decode_attention.py holds what was chosen; its row ends with "chosen". On a
CPU one way runs, which only shows that the program works. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench.ceilings import copy_rate, median_ms
from bench.hopper.kernels import e4m3, num_buffers
from bench.lists import counts
from bench.machine import describe, describe_gpu
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.kernels.decode_attention import Step, decode_attention, step_for
from runtime.decoder.kernels.operands import CacheScale, KVPages, TokenRows
from runtime.decoder.kernels.workspace import Workspace

_GROUP, _HEAD_DIM = 8, 128


def candidates(batch_size: int) -> list[Step]:
    """Some 50 ways; what `step_for` chooses is the first."""
    # One request leaves programs over whatever the crowd, more requests leave few to each.
    divided = [(1, 8), (1, 16), (1, 32)] if batch_size == 1 else [(1, 16), (2, 16), (4, 16)]
    ways = itertools.product((32, 64, 128), (1, 2, 4, 8), (1, 2, 3), divided)
    steps = [
        Step(tokens, warps, stages, crowd, splits)
        for tokens, warps, stages, (crowd, splits) in ways
        if 16 <= tokens // warps <= 32  # positions of a warp
        and tokens * stages <= 384
    ]
    chosen = step_for(batch_size)
    return [chosen, *(step for step in steps if step != chosen)]


def measure(
    kv_heads: int, batch_size: int, context: int, device: torch.device, workspace: Workspace
) -> list[dict[str, Any]]:
    """A row for each way that fits a multiprocessor, the fastest first."""
    scale = torch.tensor(0.02, device=device)
    blocks_each = -(-context // TOKENS_PER_BLOCK)
    kv_bytes = 2 * batch_size * context * kv_heads * _HEAD_DIM
    shape = (batch_size * blocks_each, kv_heads, TOKENS_PER_BLOCK, _HEAD_DIM)
    kv_scale = CacheScale(scale, 0.02)
    pages = [
        KVPages(e4m3(*shape, device=device), e4m3(*shape, device=device), kv_scale, kv_scale)
        for _ in range(num_buffers(kv_bytes))
    ]
    order = torch.randperm(len(pages[0].k), device=device)
    tables = order.to(torch.int32).view(batch_size, blocks_each)
    positions = torch.full((batch_size,), context - 1, dtype=torch.int32, device=device)
    cos, sin = (torch.rand(batch_size, _HEAD_DIM // 2, device=device) for _ in range(2))
    token_rows = TokenRows(cos, sin, tables[:, -1].long() * TOKENS_PER_BLOCK)
    heads = (_GROUP + 2) * kv_heads
    qkv = torch.randn(batch_size, heads * _HEAD_DIM, device=device).bfloat16()

    def run(step: Step, launch: int) -> object:
        own = pages[launch % len(pages)]
        return decode_attention(qkv, token_rows, tables, positions, own, scale, workspace, step)

    rows = []
    ways = candidates(batch_size) if device.type == "cuda" else candidates(batch_size)[:1]
    for step in ways:
        try:
            ms = median_ms(partial(run, step), device)
        except OutOfResources:
            continue
        splits = workspace.num_splits(batch_size * kv_heads, step.crowd, step.max_splits)
        rows.append(
            {
                "kv_heads": kv_heads,
                "batch_size": batch_size,
                "ms": ms,
                "bytes": kv_bytes,
                "num_splits": splits,
                "is_chosen": step == ways[0],
            }
            | asdict(step)
        )
    return sorted(rows, key=lambda row: row["ms"])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kv_heads", type=counts, default="8,4", help="of a rank")
    parser.add_argument("--batch_sizes", type=counts, default="1,8,64")
    parser.add_argument(
        "--context", type=int, default=2048, help="positions, the newest among them"
    )
    parser.add_argument("--num_best", type=int, default=6, help="rows printed of each shape")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = describe() | describe_gpu(device)
    programs = 4
    if device.type == "cuda":
        programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    workspace = Workspace.allocate(device, programs)
    rate = copy_rate(device)
    print(f"copy {rate / 1e12:.3f} TB/s")
    found = []
    for kv_heads in options.kv_heads:
        for batch_size in options.batch_sizes:
            rows = measure(kv_heads, batch_size, options.context, device, workspace)
            for place, row in enumerate(rows):
                if place < options.num_best or row["is_chosen"]:
                    _print_row(row, rate)
            found += rows
    json.dump({"machine": machine, "copy_bytes_per_s": rate, "attention": found}, sys.stdout)
    print()


def _print_row(row: dict[str, Any], rate: float) -> None:
    print(
        f"kv_heads {row['kv_heads']} rows {row['batch_size']:<3} {1e3 * row['ms']:7.2f} us "
        f"(bytes {1e6 * row['bytes'] / rate:6.2f})  {row['num_tokens']:>3} positions, "
        f"{row['num_warps']} warps, {row['num_stages']} stages, {row['num_splits']:>2} splits"
        f"{'  chosen' if row['is_chosen'] else ''}"
    )


if __name__ == "__main__":
    main()
