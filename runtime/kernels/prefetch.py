"""Triton: programs beside a small kernel's own that bring the next linear's weights to the level-2
cache, so that the memory is never idle while few bytes are needed. They wait for nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_BYTES_PER_THREAD = 1024
_BYTES = tl.constexpr(_BYTES_PER_THREAD)


@triton.jit
def prefetch(weights, program, num_bytes, rows, row_bytes, THREADS: tl.constexpr):
    """A thread asks for a kilobyte (PTX ISA 8.0, cp.async.bulk.prefetch.L2)."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 1024; mov.b32 $0, 0;",
        "=r,l", [weights + offsets(program, num_bytes, rows, row_bytes, THREADS)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def offsets(program, num_bytes, rows, row_bytes, THREADS: tl.constexpr):
    """Of a program's kilobytes: the first of each row, then the second of each, ..."""
    kilobyte = program.to(tl.int64) * THREADS + tl.arange(0, THREADS)
    kilobyte = tl.minimum(kilobyte, num_bytes // _BYTES - 1)
    return kilobyte % rows * row_bytes + kilobyte // rows * _BYTES


@dataclass(frozen=True, slots=True)
class Prefetch:
    """limit_bytes of a weight: the beginnings of its first `num_rows` rows, which many programs
    read at once, or with 1 row its first bytes in memory."""

    limit_bytes: int = 0
    num_rows: int = 1

    def of(self, weights: torch.Tensor | None) -> Part:
        """weights: [N, K] e4m3."""
        if weights is None or self.limit_bytes < _BYTES_PER_THREAD:
            return Part(None, 0, 1, 0)
        rows, row_bytes = min(self.num_rows, len(weights)), weights.shape[1]
        if row_bytes % _BYTES_PER_THREAD:  # its rows are no whole kilobytes
            rows = 1
        available = weights.numel() if rows == 1 else rows * row_bytes
        whole = min(available, self.limit_bytes) // _BYTES_PER_THREAD * _BYTES_PER_THREAD
        return Part(weights if whole else None, whole, rows, row_bytes)


@dataclass(frozen=True, slots=True)
class Part:
    """What a launch brings nearer, as the kernels take it."""

    weights: torch.Tensor | None
    num_bytes: int
    rows: int
    row_bytes: int

    def num_programs(self, num_warps: int) -> int:
        return triton.cdiv(self.num_bytes, 32 * num_warps * _BYTES_PER_THREAD)


NO_PREFETCH = Prefetch()
