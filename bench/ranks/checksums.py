"""Whether all ranks hold the same bits after every sum: a checksum of each, kept on the device.

Sums may be captured in CUDA graphs, so the checksum is a kernel of the graph too. A step's sums
take the places of a table in turns, in the same order on every rank; a place holds the checksums
of all steps so far, so that a difference of long ago is still seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from runtime.decoder.kernels.plain_forms import PlainForms
from runtime.decoder.models.all_reduce_norm import AllReduceNorm
from runtime.decoder.models.hopper_model import HopperModel
from runtime.decoder.models.open_model import load_model
from runtime.decoder.models.plain_model import PlainModel
from runtime.ranks import parallel_decoder
from runtime.ranks.process_group import ProcessGroup

_MAX_WORDS = 1 << 14
"""Words of 64 bits in a row: more than 8,192 float32 values."""
_FACTOR = 6364136223846793005  # odd: no two values become one


class Checksums:
    """num_sums: of one pass through the model."""

    def __init__(self, num_sums: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randint(1 << 62, (_MAX_WORDS,), generator=generator) | 1
        self.num_sums = num_sums
        self._weights = weights.to(device)
        self.table = torch.zeros(num_sums, 1, dtype=torch.int64, device=device)
        self._num_added = 0
        self._group: ProcessGroup | None = None

    def add(self, x: torch.Tensor) -> None:
        """x: [rows, columns], whose bits every rank should hold."""
        place = self.table[self._num_added % self.num_sums]
        place.mul_(_FACTOR).add_(checksum(x, self._weights))
        self._num_added += 1

    def join(self, group: ProcessGroup) -> None:
        """Lets workers answer `num_different`. Call it on every rank before the first step."""
        self._group = group
        group.on("checksums", lambda _: group.gather_columns(self.table))

    def num_different(self) -> int:
        """How many places of the table have differed among the ranks so far. On the leader."""
        assert self._group is not None, "it joins the ranks' group first"
        with self._group.leading("checksums", None):
            tables = self._group.gather_columns(self.table)  # [num_sums, ranks]
        assert tables is not None
        return int((tables != tables[:, :1]).any(1).sum())


def checksum(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """64 bits [1] of x [rows, columns] of any type, wherever it differs in one value. weights:
    int64, odd, as many as a row has words of 64 bits."""
    words = _mixed(x.contiguous().view(torch.int64))
    rows = _mixed((words * weights[: words.shape[1]]).sum(1))
    places = torch.arange(1, 2 * len(rows), 2, device=x.device)
    return (rows * places).sum(0, keepdim=True)


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """Spreads every bit over the word, and keeps words apart. Products alone carry bits upwards
    only: two signs that change in different places would cancel."""
    words = words * _FACTOR
    return words ^ (words >> 32)


class CheckedNorm:
    """An `AllReduceNorm` whose norms are added to `checksums`."""

    def __init__(self, own: AllReduceNorm, checksums: Checksums) -> None:
        self._own, self._checksums = own, checksums

    def linear_add_rms_norm(self, *operands: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, normed = self._own.linear_add_rms_norm(*operands)
        self._checksums.add(normed)
        return hidden, normed


def checked_norms(
    make: Callable[[PlainForms], AllReduceNorm], checksums: Checksums
) -> Callable[[PlainForms], CheckedNorm]:
    return lambda forms: CheckedNorm(make(forms), checksums)


def checked_sum(
    own: Callable[[torch.Tensor], torch.Tensor], checksums: Checksums
) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(x: torch.Tensor) -> torch.Tensor:
        total = own(x)
        checksums.add(total.view(len(total), -1))
        return total

    return add


@contextmanager
def checking(checksums: Checksums, group: ProcessGroup) -> Iterator[None]:
    """On every rank: decoders that ranks of `group` load in the block give `checksums` of every
    sum."""
    checksums.join(group)
    wraps: dict[str, Callable[[Any, Checksums], Any]] = {
        "all_reduce": checked_sum,
        "all_reduce_norm": checked_norms,
    }

    def load(*arguments: Any, **named: Any) -> HopperModel | PlainModel:
        for name, wrap in wraps.items():
            if named.get(name) is not None:
                named[name] = wrap(named[name], checksums)
        return load_model(*arguments, **named)

    with patch.object(parallel_decoder, "load_model", load):
        yield
