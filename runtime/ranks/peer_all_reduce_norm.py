"""Sums over ranks in peer memory: `AllReduceNorm` by kernels of our own."""

from __future__ import annotations

import torch

from nvlm.planning.peer_memory import rows_of_a_rank
from runtime.decoder.kernels import all_reduce_norm
from runtime.decoder.kernels.operands import Norm
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.kernels.fp8_linear import Fp8Linear
from runtime.ranks.peer_memory import PeerMemory

LATENCY_ROWS = 16
"""Up to which a sum is a matter of latency, and leaves the memory time for the next weights."""

ONE_SHOT_ROWS = 64
"""Rows times other ranks, up to which each rank reads every row of every other (measured on two
H200s: docs/ranks.md)."""

PUSHED_ROWS = 768
"""From how many rows on a linear is one product for each owner of rows: with fewer, reading the
weights again for each takes longer than the rows' way."""


class PeerAllReduceNorm:
    """Every call is collective."""

    def __init__(self, memory: PeerMemory, forms: PlainForms) -> None:
        self._memory, self._peers, self._forms = memory, memory.peers, forms
        self._turn = 0

    def linear_add_rms_norm(
        self,
        x: torch.Tensor,
        linear: Fp8Linear,
        hidden: torch.Tensor,
        norm: Norm,
        scale: torch.Tensor | None,
        following: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert linear.bias is None, "every rank would add it"
        memory, peers = self._memory, self._peers
        num_rows, size = hidden.shape
        places = [parts[self._turn] for parts in memory.parts]
        self._turn = 1 - self._turn  # a layer takes both, so every step begins with the first
        num_owned = rows_of_a_rank(num_rows, peers.num_ranks)
        if num_rows < PUSHED_ROWS:
            part = places[peers.rank][: hidden.numel()].view(num_rows, size)
            self._forms.linear(x, linear, torch.float32, part)
            if following is not None and num_rows <= LATENCY_ROWS:
                self._forms.load_ahead(following)
            if num_rows * (peers.num_ranks - 1) <= ONE_SHOT_ROWS:
                return all_reduce_norm.one_shot(peers, hidden, part, norm, scale)
        else:
            shape = (peers.num_ranks, num_owned, size)
            parts = [place[: peers.num_ranks * num_owned * size].view(shape) for place in places]
            part = parts[peers.rank]
            for step in range(1, peers.num_ranks + 1):  # the others' rows first: they travel
                owner = (peers.rank + step) % peers.num_ranks
                rows = x[owner * num_owned : (owner + 1) * num_owned]
                if len(rows) > 0:
                    target = parts[owner][peers.rank, : len(rows)]
                    self._forms.linear(rows, linear, torch.float32, target)
        return all_reduce_norm.two_shots(peers, hidden, part, norm, scale, memory.norms, num_owned)
