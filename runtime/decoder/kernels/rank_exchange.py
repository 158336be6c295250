"""Triton: logits to the leader, and drawn tokens from it, in memory that the ranks map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.planning.peer_memory import MAX_PROGRAMS
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.peers import Peers, meet, of_rank

_BLOCK = 4096


@triton.jit(do_not_specialize=["rank", "num_rows"])
def _gather_columns(
    distances, columns, whole, flags, epochs, num_rows, num_columns, rank, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    wait_for_previous(ON_GPU)
    pieces = tl.cdiv(num_columns, BLOCK)
    target = of_rank(whole, distances, 0)
    for piece in range(program, num_rows * pieces, tl.num_programs(0)):
        row = (piece // pieces).to(tl.int64)
        column = piece % pieces * BLOCK + tl.arange(0, BLOCK)
        mask = column < num_columns
        values = tl.load(columns + row * num_columns + column, mask)
        tl.store(target + (row * RANKS + rank) * num_columns + column, values, mask)
    epoch = tl.load(epochs + program) + 1
    if ON_GPU:
        meet(distances, flags, epoch, rank, RANKS)
    tl.store(epochs + program, epoch)


def gather_columns(peers: Peers, columns: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Collective. The ranks' float32 columns [n, num_columns] side by side, [n, ranks *
    num_columns]: whole on rank 0 until the next call. logits: a place of the piece."""
    num_rows, num_columns = columns.shape
    assert columns.is_contiguous()
    whole = logits[: peers.num_ranks * columns.numel()]
    num_pieces = num_rows * triton.cdiv(num_columns, _BLOCK)
    _gather_columns[(min(num_pieces, MAX_PROGRAMS),)](
        peers.distances, columns, whole, peers.flags, peers.epochs, num_rows, num_columns,
        peers.rank, RANKS=peers.num_ranks, BLOCK=_BLOCK, num_warps=8, **dependent(columns.device),
    )  # fmt: skip
    return whole.view(num_rows, peers.num_ranks * num_columns)


@triton.jit(do_not_specialize=["rank", "count"])
def _share_tokens(
    distances, tokens, place, flags, epochs, count, rank, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    wait_for_previous(ON_GPU)
    if rank == 0:
        index = tl.arange(0, BLOCK)
        values = tl.load(tokens + index, index < count)
        for peer in tl.static_range(RANKS):
            tl.store(of_rank(place, distances, peer) + index, values, index < count)
    epoch = tl.load(epochs) + 1
    if ON_GPU:
        meet(distances, flags, epoch, rank, RANKS)
    tl.store(epochs, epoch)


def share_tokens(peers: Peers, tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Collective. Rank 0's tokens [n] int64, on every rank until the next call. tokens: of the
    other ranks anything of that shape. place: of the piece, at least n."""
    _share_tokens[(1,)](
        peers.distances, tokens, place, peers.flags, peers.epochs, len(tokens), peers.rank,
        RANKS=peers.num_ranks, BLOCK=triton.next_power_of_2(len(place)), num_warps=1,
        **dependent(tokens.device),
    )  # fmt: skip
    return place[: len(tokens)]
