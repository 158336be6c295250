"""Triton: programs beside a small kernel's own that bring the next linear's weights to the level-2
cache, so that the memory is never idle while few bytes are needed. They wait for nothing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BYTES_PER_THREAD = 1024
_BYTES = tl.constexpr(_BYTES_PER_THREAD)


@triton.jit
def prefetch(weights, program, num_bytes, THREADS: tl.constexpr):
    """A thread asks for a kilobyte (PTX ISA 8.0, cp.async.bulk.prefetch.L2)."""
    offset = (program.to(tl.int64) * THREADS + tl.arange(0, THREADS)) * _BYTES
    offset = tl.minimum(offset, num_bytes - _BYTES)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.b32 $0, 0;", "=r,l", [weights + offset],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def prefetched_bytes(weights: torch.Tensor | None, limit: int) -> int:
    """Of `weights`, e4m3: whole kilobytes, at most `limit`."""
    if weights is None:
        return 0
    return min(weights.numel(), limit) // _BYTES_PER_THREAD * _BYTES_PER_THREAD


def num_programs(num_bytes: int, num_warps: int) -> int:
    return triton.cdiv(num_bytes, 32 * num_warps * _BYTES_PER_THREAD)
