"""The kernels of several GPUs against plain torch. The ranks are streams of one GPU here, each with
a piece of its memory. In Triton's interpreter nobody waits, and the parts are there already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from nvlm.model.number_formats import fp8
from nvlm.planning.peer_memory import MAX_PROGRAMS
from runtime.decoder.kernels.operands import Norm
from runtime.decoder.kernels.plain_forms import PlainForms
from tests.conftest import HAS_HOPPER
from tests.decoder.test_kernels import DEVICE, DTYPE, assert_same_e4m3, randn, rounding, scalar
from tests.support.tolerances import KERNEL_BF16, relative_error

pytest.importorskip("triton", reason="triton is not installed")


from runtime.decoder.kernels.all_reduce_norm import one_shot, two_shots
from runtime.decoder.kernels.rank_exchange import gather_columns, share_tokens
from runtime.kernels.peers import Peers

assert rounding is not None  # a fixture of every test here too
PLAIN = PlainForms()
ON_GPU = [
    pytest.mark.hopper,
    pytest.mark.skipif(not HAS_HOPPER, reason="ranks that wait for one another need a GPU"),
]


@dataclass(frozen=True)
class Rank:
    """One of several in this process. piece: its memory; peers: how it reaches the others'."""

    peers: Peers
    piece: torch.Tensor

    def view(self, dtype: torch.dtype, offset: int, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.piece[offset : offset + count].view(dtype).view(shape)


def make_ranks(num_ranks: int, num_bytes: int) -> list[Rank]:
    flag_bytes = 4 * MAX_PROGRAMS * num_ranks
    size = -(-(flag_bytes + num_bytes) // 256) * 256
    memory = torch.zeros(num_ranks, size, dtype=torch.uint8, device=DEVICE)
    ranks = []
    for rank, piece in enumerate(memory):
        distances = [size * (other - rank) for other in range(num_ranks)]
        peers = Peers(
            rank,
            num_ranks,
            torch.tensor(distances, dtype=torch.int64, device=DEVICE),
            piece[-flag_bytes:].view(torch.int32),
            torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=DEVICE),
        )
        ranks.append(Rank(peers, piece))
    return ranks


def together(ranks: list[Rank], work: Callable[[Rank], object]) -> list[object]:
    """What each rank's work gives; on a GPU all are launched before any has to be done."""
    if DEVICE.type == "cpu":
        return [work(rank) for rank in ranks]
    torch.cuda.synchronize()
    found = []
    for rank in ranks:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(work(rank))
    torch.cuda.synchronize()
    return found


def expected_norm(
    hidden: torch.Tensor, parts: list[torch.Tensor], norm: Norm, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return PLAIN.add_rms_norm(hidden, total, norm, scale)


def assert_norms(found: torch.Tensor, expected: torch.Tensor) -> None:
    if found.dtype == fp8.E4M3:
        assert_same_e4m3(found, expected)
    else:
        assert relative_error(found, expected) < KERNEL_BF16


@pytest.mark.parametrize("has_scale", [True, False], ids=["e4m3", "dtype"])
@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(8, marks=ON_GPU)])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 128), (17, 256), (9, 200)])
def test_one_shot_and_two_give_the_sum_of_ranks_normed(
    num_rows: int, size: int, num_ranks: int, has_scale: bool
) -> None:
    hidden, norm = randn(num_rows, size), Norm(randn(size, seed=1), 1e-6)
    scale = scalar(0.01) if has_scale else None
    parts = [randn(num_rows, size, seed=9 + i, dtype=torch.float32) for i in range(num_ranks)]
    num_owned = -(-num_rows // num_ranks)
    part_bytes = 4 * num_ranks * num_owned * size
    ranks = make_ranks(num_ranks, 2 * part_bytes)
    expected_hidden, expected = expected_norm(hidden, parts, norm, scale)

    def own(rank: int) -> slice:
        return slice(rank * num_owned, min((rank + 1) * num_owned, num_rows))

    for rank, part in zip(ranks, parts, strict=True):
        rank.view(torch.float32, 0, num_rows, size).copy_(part)
    norms = [rank.view(DTYPE, part_bytes, num_ranks * num_owned * size) for rank in ranks]
    pulled = together(
        ranks,
        lambda r: one_shot(r.peers, hidden, r.view(torch.float32, 0, num_rows, size), norm, scale),
    )
    for new_hidden, normed in pulled:  # type: ignore[misc]
        assert torch.equal(new_hidden, expected_hidden), "added in the order of ranks"
        assert_norms(normed, expected)
        assert torch.equal(normed.view(torch.uint8), pulled[0][1].view(torch.uint8))  # type: ignore[index]

    def check(found: list[object]) -> None:
        for index, (new_hidden, normed) in enumerate(found):  # type: ignore[misc, arg-type]
            rows = own(index)
            assert torch.equal(new_hidden[rows], expected_hidden[rows])
            assert torch.equal(normed.view(torch.uint8), pulled[0][1].view(torch.uint8))  # type: ignore[index]

    check(
        together(
            ranks,
            lambda r: two_shots(
                r.peers,
                hidden,
                r.view(torch.float32, 0, num_rows, size),
                norm,
                scale,
                norms[r.peers.rank],
                num_owned,
            ),
        )
    )
    for rank in ranks:  # as linears write them to the owners of rows
        inbox = rank.view(torch.float32, 0, num_ranks, num_owned, size)
        for source, part in enumerate(parts):
            rows = part[own(rank.peers.rank)]
            inbox[source, : len(rows)] = rows
    check(
        together(
            ranks,
            lambda r: two_shots(
                r.peers,
                hidden,
                r.view(torch.float32, 0, num_ranks, num_owned, size),
                norm,
                scale,
                norms[r.peers.rank],
                num_owned,
            ),
        )
    )


@pytest.mark.parametrize("num_ranks", [2, pytest.param(5, marks=ON_GPU)])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 300), (7, 4100)])
def test_the_leader_gets_all_columns(num_rows: int, num_columns: int, num_ranks: int) -> None:
    columns = [randn(num_rows, num_columns, seed=i, dtype=torch.float32) for i in range(num_ranks)]
    count = num_ranks * num_rows * num_columns
    ranks = make_ranks(num_ranks, 4 * count)
    found = together(
        ranks,
        lambda r: gather_columns(r.peers, columns[r.peers.rank], r.view(torch.float32, 0, count)),
    )
    assert torch.equal(found[0], torch.cat(columns, dim=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(8, marks=ON_GPU)])
def test_all_ranks_get_the_leaders_tokens(num_ranks: int) -> None:
    ranks = make_ranks(num_ranks, 8 * 64)
    tokens = torch.tensor([5, 152_063, 0], device=DEVICE)
    nothing = torch.zeros_like(tokens)
    found = together(
        ranks,
        lambda r: share_tokens(
            r.peers, nothing if r.peers.rank else tokens, r.view(torch.int64, 0, 64)
        ),
    )
    assert all(torch.equal(each, tokens) for each in found)  # type: ignore[arg-type]
