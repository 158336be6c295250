"""Which way a sum over ranks takes, and where its parts lie: threads are the ranks, and plain torch
stands in for the kernels (tests/decoder/test_rank_kernels.py has those)."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nvlm.model.number_formats import fp8
from nvlm.planning.peer_memory import rows_of_a_rank
from runtime.decoder.kernels.operands import Norm
from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.kernels.fp8_linear import Fp8Linear
from tests.support.tolerances import FLOAT32_ROW_PARALLEL, relative_error

pytest.importorskip("triton", reason="triton is not installed")

from runtime.ranks import peer_all_reduce_norm
from runtime.ranks.peer_all_reduce_norm import (
    LATENCY_ROWS,
    ONE_SHOT_ROWS,
    PUSHED_ROWS,
    PeerAllReduceNorm,
)

SIZE, DEPTH, SCALE = 32, 48, 0.02
PLAIN = PlainForms()


class Ranks:
    """Memory of all ranks, and the kernels' twins over it. ways: of the sums, rank 0's."""

    def __init__(self, num_ranks: int, max_rows: int) -> None:
        values = num_ranks * rows_of_a_rank(max_rows, num_ranks) * SIZE
        self.parts = [torch.full((2, values), float("nan")) for _ in range(num_ranks)]
        self.norms = [torch.zeros(values) for _ in range(num_ranks)]
        self.num_ranks, self.ways = num_ranks, list[str]()
        self._barrier = threading.Barrier(num_ranks, timeout=60)

    def memory(self, rank: int) -> Any:
        peers = SimpleNamespace(rank=rank, num_ranks=self.num_ranks)
        return SimpleNamespace(peers=peers, parts=self.parts, norms=self.norms[rank])

    def _note(self, peers: Any, way: str) -> None:
        if peers.rank == 0:
            self.ways.append(way)

    def _of(self, rank: int, own: torch.Tensor) -> torch.Tensor:
        """The place of another rank that is `own`'s in the caller's."""
        offset = own.storage_offset() % self.parts[0].numel()
        return self.parts[rank].flatten()[offset : offset + own.numel()].view(own.shape)

    def one_shot(
        self, peers: Any, hidden: torch.Tensor, part: torch.Tensor, norm: Norm, scale: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._note(peers, "one shot")
        self._barrier.wait()
        total = sum(self._of(rank, part) for rank in range(self.num_ranks))
        found = PLAIN.add_rms_norm(hidden, total, norm, scale)  # type: ignore[arg-type]
        self._barrier.wait()
        return found

    def two_shots(
        self,
        peers: Any,
        hidden: torch.Tensor,
        parts: torch.Tensor,
        norm: Norm,
        scale: Any,
        norms: torch.Tensor,
        num_owned: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._note(peers, "pushed" if parts.dim() == 3 else "two shots")
        assert norms is self.norms[peers.rank]
        self._barrier.wait()
        own = slice(peers.rank * num_owned, min((peers.rank + 1) * num_owned, len(hidden)))
        if parts.dim() == 3:
            total = sum(parts[source, : own.stop - own.start] for source in range(self.num_ranks))
        else:
            total = sum(self._of(rank, parts)[own] for rank in range(self.num_ranks))
        new_hidden = torch.full_like(hidden, float("nan"))
        new_hidden[own], normed = PLAIN.add_rms_norm(hidden[own], total, norm, scale)  # type: ignore[arg-type]
        for each in self.norms:
            each[own.start * SIZE : own.stop * SIZE] = normed.flatten()
        self._barrier.wait()
        return new_hidden, norms[: hidden.numel()].view(hidden.shape).clone()


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(rank: int, seed: int) -> tuple[torch.Tensor, Fp8Linear]:
    """A rank's input rows [1000, DEPTH] and its columns of the linear."""
    x = fp8.quantize(randn(1000, DEPTH, seed=100 * seed + rank), SCALE)
    weight = fp8.quantize(randn(SIZE, DEPTH, seed=100 * seed + 50 + rank), SCALE)
    return x, Fp8Linear(weight, torch.tensor(SCALE), torch.tensor(SCALE * SCALE))


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("num_rows", "way"),
    [
        (1, "one shot"),
        (17, "one shot"),
        (ONE_SHOT_ROWS + 1, "two shots"),
        (PUSHED_ROWS - 1, "two shots"),
        (PUSHED_ROWS, "pushed"),
        (PUSHED_ROWS + 5, "pushed"),
    ],
)
def test_every_way_gives_the_sum_of_ranks_layer_after_layer(
    num_rows: int, way: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, norm = Ranks(num_ranks, 1000), Norm(randn(SIZE, seed=1), 1e-6)
    for name in ("one_shot", "two_shots"):
        monkeypatch.setattr(peer_all_reduce_norm.all_reduce_norm, name, getattr(ranks, name))

    def run(rank: int) -> list[torch.Tensor]:
        sums, normed = PeerAllReduceNorm(ranks.memory(rank), PLAIN), []
        hidden = randn(num_rows, SIZE, seed=0)
        for index in range(4):
            x, linear = layer(rank, index)
            hidden, rows = sums.linear_add_rms_norm(x[:num_rows], linear, hidden, norm, None)
            normed.append(rows)
        return normed

    with ThreadPoolExecutor(num_ranks) as pool:
        found = list(pool.map(run, range(num_ranks)))
    assert ranks.ways == [way] * 4
    hidden = randn(num_rows, SIZE, seed=0)
    for index in range(4):
        total = torch.zeros_like(hidden)
        for rank in range(num_ranks):
            x, linear = layer(rank, index)
            total += PLAIN.linear(x[:num_rows], linear, torch.float32)
        hidden, expected = PLAIN.add_rms_norm(hidden, total, norm, None)
        for rank in range(num_ranks):
            assert torch.equal(found[rank][index], found[0][index]), "all ranks hold the same bits"
            assert relative_error(found[rank][index], expected) <= FLOAT32_ROW_PARALLEL


def test_the_ways_follow_one_another() -> None:
    assert LATENCY_ROWS < ONE_SHOT_ROWS < PUSHED_ROWS
