"""The kernels of a decoder layer on a Hopper GPU, each beside the ceiling that its bytes set.

    python -m bench.hopper.kernels [--shape 72b|tiny] [--batch_sizes 1,8,64] [--context 2048]

The device's copy rate is measured first, in the same run; a kernel's bytes (each input read once,
each output written once) over its time are given as a share of it. The FP8 linears are timed with
both ways to add, beside float64, and the head in FP8 beside the one in bfloat16. Times are medians
of CUDA graph replays over buffers larger than the cache. On a CPU the plain forms run, which only
shows that the program works. The last line is JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench.ceilings import copy_rate, median_ms
from bench.lists import counts
from bench.machine import describe, describe_gpu
from nvlm.model.number_formats import fp8
from nvlm.planning.hopper import CHUNK_SIZES
from nvlm.program.process import set_up_cublas
from runtime.decoder.block_allocator import TOKENS_PER_BLOCK
from runtime.decoder.kernels.operands import (
    CacheScale,
    ChunkTiles,
    Contexts,
    KVPages,
    Norm,
    TokenRows,
    tile_tokens,
)
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.chunk_inputs import pages_of, tiles_of
from runtime.decoder.models.step import SequenceStep
from runtime.kernels.fp8_linear import Fp8Linear

SHAPES = {"72b": (8192, 29568, 64, 8, 128), "tiny": (256, 512, 4, 2, 64)}
VOCAB_SIZES = {"72b": 152064, "tiny": 512}
CACHE_BYTES = 200_000_000  # several times the level-2 cache
LAUNCHES = 8  # in one graph, over different buffers

Run = Callable[[int], object]  # takes the number of the buffers to use


def e4m3(*shape: int, device: torch.device) -> torch.Tensor:
    return fp8.quantize(torch.randn(*shape, device=device, dtype=torch.bfloat16), 0.01)


def measure_linear(
    forms: PlainForms, rows: int, columns: int, depth: int, device: torch.device
) -> dict[str, tuple[float, int]]:
    scale, count = torch.tensor(1e-4, device=device), num_buffers(columns * depth)
    linears = [Fp8Linear(e4m3(columns, depth, device=device), scale, scale) for _ in range(count)]
    x = e4m3(rows, depth, device=device)
    moved = columns * depth + rows * depth + 2 * rows * columns

    def timed(multiply: Callable[..., object]) -> tuple[float, int]:
        def run(i: int) -> object:
            return multiply(x, linears[i % len(linears)], torch.bfloat16)

        return median_ms(run, device), moved

    found = {"linear": timed(forms.linear)}
    if device.type == "cuda":
        from runtime.kernels.tensor_core_linear import TensorCoreLinear

        exactly = TensorCoreLinear(device)
        fast = functools.partial(exactly, use_fast_accum=True)
        oracle = x[:16].double() @ linears[0].weight.double().t() * scale.double()
        for name, multiply in (("sums of 128", exactly), ("fast accumulation", fast)):
            found[f"linear, {name}"] = timed(multiply)
            y = multiply(x[:16], linears[0], torch.bfloat16).double()
            error = float((y - oracle).norm() / oracle.norm())
            print(f"{rows} rows, {columns} x {depth}, {name}: relative error {error:.2e}")
    return found


def measure_head(
    forms: PlainForms, num_rows: int, vocab_size: int, size: int, device: torch.device
) -> dict[str, tuple[float, int]]:
    """Float32 logits by a head in FP8 and by one in bfloat16."""
    scale, num_values = torch.tensor(1e-4, device=device), vocab_size * size
    x, logits_bytes = torch.randn(num_rows, size, device=device).bfloat16(), 4 * vocab_size
    quantised = e4m3(num_rows, size, device=device)
    stored = [e4m3(vocab_size, size, device=device) for _ in range(num_buffers(num_values))]
    heads = [Fp8Linear(weight, scale, scale) for weight in stored]
    wide = [weight.to(torch.bfloat16) for weight in stored[: num_buffers(2 * num_values)]]

    def in_fp8(i: int) -> object:
        return forms.linear(quantised, heads[i % len(heads)], torch.float32)

    def in_bfloat16(i: int) -> object:
        return forms.head(x, wide[i % len(wide)])

    fp8_bytes, bfloat16_bytes = (
        itemsize * (num_values + num_rows * size) + num_rows * logits_bytes for itemsize in (1, 2)
    )
    return {
        "head, FP8": (median_ms(in_fp8, device), fp8_bytes),
        "head, bfloat16": (median_ms(in_bfloat16, device), bfloat16_bytes),
    }


def fp8_pages(shape: tuple[int, ...], scale: torch.Tensor) -> KVPages:
    """Random keys and values of a layer. scale: 0.02 on their device."""
    k, v = (e4m3(*shape, device=scale.device) for _ in "kv")
    kv_scale = CacheScale(scale, 0.02)
    return KVPages(k, v, kv_scale, kv_scale)


def num_buffers(num_bytes: int) -> int:
    """So many that a graph's launches do not find theirs in the level-2 cache."""
    return max(1, min(LAUNCHES, 4 * CACHE_BYTES // num_bytes)) if torch.cuda.is_available() else 1


def measure(
    shape: tuple[int, ...], batch_size: int, context: int, device: torch.device, forms: PlainForms
) -> dict[str, tuple[float, int]]:
    """Milliseconds and bytes of each kernel."""
    size, intermediate, heads, kv_heads, head_dim = shape
    scale = torch.tensor(0.02, device=device)
    hidden, delta = (torch.randn(batch_size, size, device=device).bfloat16() for _ in range(2))
    norm = Norm(torch.ones(size, device=device, dtype=torch.bfloat16), 1e-6)
    x = e4m3(batch_size, size, device=device)
    gate_ups = [
        Fp8Linear(e4m3(2 * intermediate, size, device=device), scale, scale)
        for _ in range(num_buffers(2 * intermediate * size))
    ]
    qkv = torch.randn(batch_size, (heads + 2 * kv_heads) * head_dim, device=device).bfloat16()
    blocks_each = -(-context // TOKENS_PER_BLOCK)
    num_blocks = batch_size * blocks_each
    kv_bytes = 2 * batch_size * context * kv_heads * head_dim
    cache_shape = (num_blocks, kv_heads, TOKENS_PER_BLOCK, head_dim)
    pages = [fp8_pages(cache_shape, scale) for _ in range(num_buffers(kv_bytes))]
    wide_pages = [
        KVPages(
            torch.randn(cache_shape, device=device, dtype=torch.bfloat16),
            torch.randn(cache_shape, device=device, dtype=torch.bfloat16),
            None,
            None,
        )
        for _ in range(num_buffers(2 * kv_bytes))
    ]
    tables = torch.randperm(num_blocks, device=device).to(torch.int32).view(batch_size, -1)
    positions = torch.full((batch_size,), context - 1, dtype=torch.int32, device=device)
    slots = tables[:, -1].long() * TOKENS_PER_BLOCK
    cos, sin = (torch.rand(batch_size, head_dim // 2, device=device) for _ in range(2))
    rows = TokenRows(cos, sin, slots)
    down = Fp8Linear(e4m3(16, 16, device=device), scale, scale)  # whose input's scale is read
    runs: dict[str, tuple[Run, int]] = {
        "add_rms_norm": (
            lambda _: forms.add_rms_norm(hidden, delta, norm, scale),
            7 * batch_size * size,
        ),
        "gate_up_swiglu": (
            lambda i: forms.gate_up_swiglu(x, gate_ups[i % len(gate_ups)], down, torch.bfloat16),
            2 * intermediate * size + batch_size * (size + intermediate),
        ),
        "rope_append": (
            lambda i: forms.rope_append(qkv, rows, pages[i % len(pages)]),
            4 * qkv.numel(),
        ),
        "decode_attention": (
            lambda i: forms.decode_attention(
                qkv, rows, tables, positions, pages[i % len(pages)], scale
            ),
            kv_bytes,
        ),
        "decode_attention, bfloat16 KV": (
            lambda i: forms.decode_attention(
                qkv, rows, tables, positions, wide_pages[i % len(wide_pages)], scale
            ),
            2 * kv_bytes,
        ),
    }
    found = {name: (median_ms(run, device), moved) for name, (run, moved) in runs.items()}
    return found | measure_linears(shape, batch_size, device, forms)


def measure_chunk(
    shape: tuple[int, ...], num_rows: int, context: int, device: torch.device, forms: PlainForms
) -> dict[str, tuple[float, int]]:
    """Attention of one chunk of a prompt, whose last row sees `context` positions, its context
    gathered before: milliseconds, and bytes of the keys and values."""
    _, _, heads, kv_heads, head_dim = shape
    num_blocks = -(-context // TOKENS_PER_BLOCK)
    scale = torch.tensor(0.02, device=device)
    kv_bytes = 2 * context * kv_heads * head_dim
    pages = [
        fp8_pages((num_blocks, kv_heads, TOKENS_PER_BLOCK, head_dim), scale)
        for _ in range(num_buffers(kv_bytes))
    ]
    num_tokens = tile_tokens(heads // kv_heads)
    blocks = torch.randperm(num_blocks).tolist()
    step = SequenceStep([0] * num_rows, context - num_rows, blocks, None, 0)
    tiles = ChunkTiles(tiles_of([step], num_tokens).to(device), num_tokens)
    filled = pages_of([step]).to(device)
    num_pages = torch.tensor([len(filled)], dtype=torch.int32, device=device)
    shape_gathered = (2, kv_heads, len(filled) * TOKENS_PER_BLOCK, head_dim)
    k, v = torch.empty(shape_gathered, dtype=torch.float16, device=device)
    contexts = Contexts(filled, num_pages, k, v)
    q = torch.randn(num_rows, heads, head_dim, device=device).bfloat16()
    out = e4m3(num_rows, heads * head_dim, device=device)

    def run(launch: int) -> None:
        forms.chunk_attention(q, tiles, contexts, pages[launch % len(pages)], scale, out)

    return {"chunk_attention": (median_ms(run, device), kv_bytes)}


def measure_linears(
    shape: tuple[int, ...], num_rows: int, device: torch.device, forms: PlainForms
) -> dict[str, tuple[float, int]]:
    size, intermediate, heads, kv_heads, head_dim = shape
    linears = {
        "qkv": ((heads + 2 * kv_heads) * head_dim, size),
        "dense": (size, heads * head_dim),
        "gate_up": (2 * intermediate, size),
        "down": (size, intermediate),
    }
    return {
        f"{linear} {name}": row
        for linear, (columns, depth) in linears.items()
        for name, row in measure_linear(forms, num_rows, columns, depth, device).items()
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="72b")
    parser.add_argument("--batch_sizes", type=counts, default="1,8,64")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument(
        "--prompts", type=counts, default=[], help="rows to time the linears alone with"
    )
    options = parser.parse_args(arguments)
    if options.context < 1:
        parser.error(f"--context is {options.context}, expected positions from 1; give 2048")
    set_up_cublas(os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    forms = PlainForms()
    machine = describe() | describe_gpu(device)
    if device.type == "cuda":
        from runtime.decoder.kernels.triton_forms import TritonForms

        forms = TritonForms(device)
    rate = copy_rate(device)
    print(f"copy {rate / 1e12:.3f} TB/s")
    rows: list[dict[str, Any]] = []

    def show(num_rows: int, found: dict[str, tuple[float, int]]) -> None:
        for name, (ms, moved) in found.items():
            share = moved / (1e-3 * ms) / rate
            print(f"rows {num_rows:<4} {name:<44}{1e3 * ms:9.2f} us {share:7.1%} of the copy rate")
            rows.append({"batch_size": num_rows, "kernel": name, "ms": ms, "bytes": moved})

    shape = SHAPES[options.shape]
    for batch_size in options.batch_sizes:
        show(batch_size, measure(shape, batch_size, options.context, device, forms))
        vocab_size = VOCAB_SIZES[options.shape]
        show(batch_size, measure_head(forms, batch_size, vocab_size, shape[0], device))
    for num_rows in options.prompts:
        show(num_rows, measure_linears(shape, num_rows, device, forms))
    for num_rows in CHUNK_SIZES[::2]:
        if num_rows <= options.context:
            show(num_rows, measure_chunk(shape, num_rows, options.context, device, forms))
    json.dump({"machine": machine, "copy_bytes_per_s": rate, "kernels": rows}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
