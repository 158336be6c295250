"""Brings weights that a later kernel reads into the second level of cache, while memory is idle.

Some kernels wait more than they read (attention of few rows, sums over ranks). Beside them, on a
branch of the CUDA graph, the weights of the linear after them are loaded and forgotten: the
beginning of every row, since a product's programs begin with those. Nothing waits for it. The
instructions made for this (`prefetch`, `cp.async.bulk.prefetch`) bring nothing on an H200
(docs/log.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_MAX_BYTES = 24 << 20  # what comes in the time of a sum over ranks or of one row's attention
_NUM_PROGRAMS = 128
_NUM_WARPS = 8
_SECTOR_BYTES = 32  # what one load brings
_AT_A_TIME = 4


@triton.jit
def load_and_forget(places):
    """places: a byte's address in each sector that is wanted. Nothing waits for them."""
    tl.inline_asm_elementwise(
        "{ .reg .u32 forgotten; ld.volatile.global.u32 forgotten, [$1]; mov.u32 $0, 0; }",
        "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _load_ahead(
    weight, num_rows, row_bytes, row_sectors, LANES: tl.constexpr, AT_A_TIME: tl.constexpr
):  # fmt: skip
    num_sectors = num_rows * row_sectors
    share: tl.constexpr = LANES * AT_A_TIME
    for first in range(tl.program_id(0) * share, num_sectors, tl.num_programs(0) * share):
        for i in tl.static_range(AT_A_TIME):
            sector = tl.minimum(first + i * LANES + tl.arange(0, LANES), num_sectors - 1)
            row, in_row = sector // row_sectors, sector % row_sectors
            load_and_forget(weight + row.to(tl.int64) * row_bytes + in_row * 32)


class LoadAhead:
    """The branch of a graph on which weights are loaded. Outside a capture it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._branch = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._is_open = False

    def start(self, weight: torch.Tensor) -> None:
        """From here on, beside what is launched next. weight: [rows, columns] of one-byte
        numbers."""
        if self._branch is None or not torch.cuda.is_current_stream_capturing():
            return
        num_rows, row_bytes = weight.shape
        row_sectors = min(_MAX_BYTES // num_rows, row_bytes) // _SECTOR_BYTES
        self._branch.wait_stream(torch.cuda.current_stream())
        self._is_open = True
        with torch.cuda.stream(self._branch):
            _load_ahead[(_NUM_PROGRAMS,)](
                weight, num_rows, row_bytes, row_sectors, LANES=32 * _NUM_WARPS,
                AT_A_TIME=_AT_A_TIME, num_warps=_NUM_WARPS,
            )  # fmt: skip

    def join(self) -> None:
        """Call this before a capture ends."""
        if self._branch is not None and self._is_open:
            torch.cuda.current_stream().wait_stream(self._branch)
            self._is_open = False
