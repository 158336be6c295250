"""Triton: the sum over ranks, residual, RMSNorm and quantise, in memory that the ranks' GPUs map of
one another.

In one shot every rank reads all ranks' parts of every row, and keeps the whole residual stream. In
two shots a rank adds and norms the rows that it owns, writes their norms to all ranks, and keeps
their residual alone; it reads the others' parts of its rows, or their linears write them to it. A
row is added in the order of ranks, so all ranks hold the same bits, and every way gives the same.

A rank meets the others only after all its earlier kernels, so two alternating places for parts
suffice, and one for norms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvlm.model.number_formats.fp8 import E4M3
from nvlm.planning.peer_memory import MAX_PROGRAMS
from runtime.decoder.kernels import norm_row
from runtime.decoder.kernels.operands import Norm
from runtime.kernels.dependent_launch import dependent, wait_for_previous
from runtime.kernels.peers import Peers, meet, of_rank
from runtime.kernels.spare_rows import empty_with_spare_rows


@triton.jit(do_not_specialize=["rank", "num_rows", "num_owned"])
def _all_reduce_norm(
    distances, part, flags, epochs, hidden, weight, scale, new_hidden, normed, eps,
    num_rows, num_owned, size, rank, RANKS: tl.constexpr, TWO_SHOTS: tl.constexpr,
    IS_PUSHED: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    w = tl.load(weight + columns, mask, other=0.0)
    wait_for_previous(ON_GPU)
    epoch = tl.load(epochs + program) + 1
    if ON_GPU:
        meet(distances, flags, epoch, rank, RANKS)
    first = rank * num_owned if TWO_SHOTS else 0
    end = tl.minimum(first + num_owned, num_rows)
    for row in range(first + program, end, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * size + columns
        x = tl.load(hidden + place, mask, other=0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(RANKS):
            if IS_PUSHED:  # each rank wrote its part of these rows here
                source = part + (peer * num_owned + row - first).to(tl.int64) * size + columns
            else:
                source = of_rank(part, distances, peer) + place
            added = tl.load(source, mask, other=0.0)
            total = total + added if peer > 0 else added
        x = norm_row.add(x, total)
        tl.store(new_hidden + place, x, mask)
        values = norm_row.rms_norm(x, w, scale, size, eps, QUANTIZE)
        if TWO_SHOTS:
            for peer in tl.static_range(RANKS):
                tl.store(of_rank(normed, distances, peer) + place, values, mask)
        else:
            tl.store(normed + place, values, mask)
    if TWO_SHOTS and ON_GPU:
        epoch += 1
        meet(distances, flags, epoch, rank, RANKS)
    tl.store(epochs + program, epoch)


def one_shot(
    peers: Peers, hidden: torch.Tensor, part: torch.Tensor, norm: Norm, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Collective. hidden + the sum of all ranks' parts, and its RMSNorm, e4m3 if a scale is given:
    two [T, hidden_size].

    part: this rank's, float32 [T, hidden_size], at the same place of every rank's piece.
    """
    dtype = hidden.dtype if scale is None else E4M3
    normed = empty_with_spare_rows(*hidden.shape, dtype=dtype, device=hidden.device)
    return _launch(peers, hidden, part, norm, scale, normed, None)


def two_shots(
    peers: Peers,
    hidden: torch.Tensor,
    parts: torch.Tensor,
    norm: Norm,
    scale: torch.Tensor | None,
    norms: torch.Tensor,
    num_owned: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `one_shot`, of which the first holds, and `hidden` needs, this rank's rows only.

    parts: as of `one_shot`, or float32 [ranks, num_owned, hidden_size], where each rank wrote its
    part of the rows that this rank owns. norms: a place of the piece in `hidden`'s type, where the
    second lies until the next call. num_owned: rows of a rank, the last ranks' fewer.
    """
    normed = norms.view(hidden.dtype if scale is None else E4M3)[: hidden.numel()]
    return _launch(peers, hidden, parts, norm, scale, normed.view(hidden.shape), num_owned)


def _launch(
    peers: Peers,
    hidden: torch.Tensor,
    part: torch.Tensor,
    norm: Norm,
    scale: torch.Tensor | None,
    normed: torch.Tensor,
    num_owned: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """num_owned: None for one shot."""
    (num_rows, size), has_two_shots = hidden.shape, num_owned is not None
    num_owned = num_rows if num_owned is None else num_owned
    new_hidden = torch.empty_like(hidden)
    _all_reduce_norm[(min(num_owned, MAX_PROGRAMS),)](
        peers.distances, part, peers.flags, peers.epochs, hidden, norm.weight, scale, new_hidden,
        normed, norm.eps, num_rows, num_owned, size, peers.rank, RANKS=peers.num_ranks,
        TWO_SHOTS=has_two_shots, IS_PUSHED=part.dim() == 3, QUANTIZE=scale is not None,
        BLOCK=triton.next_power_of_2(size), num_warps=16 if has_two_shots else 32,
        **dependent(hidden.device),
    )  # fmt: skip
    return new_hidden, normed
