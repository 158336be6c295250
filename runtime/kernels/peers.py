"""Triton: how kernels on several GPUs of one machine wait for one another, in memory that all map.

Programs of the same number meet: each writes a growing number, its epoch, to a flag of its own in
every rank's memory, then waits until all ranks' flags in its own memory have reached it. All ranks
launch the same kernels in the same order, with the same grids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Peers:
    """A piece of memory on every rank, all of one layout, and how kernels reach it."""

    rank: int  # this one, from 0
    num_ranks: int  # that share the memory
    # [ranks] int64 on the device: bytes from this rank's piece to each rank's, a multiple of 16.
    distances: torch.Tensor
    flags: torch.Tensor  # int32 [programs * ranks] in the piece, 0 at first
    epochs: torch.Tensor  # int32 [programs], this rank's, 0 at first


@triton.jit
def meet(distances, flags, epoch, rank, RANKS: tl.constexpr):
    """Waits until the programs of this number on all ranks are here. What each rank wrote before
    can be read after it."""
    own = (flags + tl.program_id(0) * RANKS).to(tl.int64)
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        """{ .reg .pred in; .reg .u32 peer; .reg .u64 place;
        mov.u32 peer, %tid.x; setp.lt.u32 in, peer, $4;
        mul.wide.u32 place, peer, 8; add.u64 place, place, $1;
        @in ld.global.u64 place, [place]; add.u64 place, place, $2;
        @in st.release.sys.global.u32 [place], $3; mov.u32 $0, 0; }""",
        "=r,l,l,r,r", [distances.to(tl.int64), own + rank * 4, epoch, RANKS],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.inline_asm_elementwise(
        """{ .reg .pred in, early; .reg .u32 peer, found; .reg .s32 lead; .reg .u64 place;
        mov.u32 peer, %tid.x; setp.lt.u32 in, peer, $3;
        mul.wide.u32 place, peer, 4; add.u64 place, place, $1;
        @!in bra over;
        again: ld.acquire.sys.global.u32 found, [place];
        sub.s32 lead, found, $2; setp.lt.s32 early, lead, 0; @early bra again;
        over: mov.u32 $0, 0; }""",
        "=r,l,r,r", [own, epoch, RANKS], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def of_rank(pointer, distances, peer):
    """A place of this rank's piece, in another's."""
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    distance = tl.load(distances + peer)
    if size > 1:  # a division by 1 would vanish, and what is said of its result with it
        distance //= size
    return pointer + tl.multiple_of(distance, 16)
