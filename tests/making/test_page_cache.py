"""What a conversion reads does not stay in the page cache, and what was there before stays: by
mincore(2) and the kernel's own page cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from build.conversion import page_cache
from build.conversion.page_cache import BroughtPages, give_back
from build.conversion.pipeline import ReadAhead
from nvlm.formats.safetensors_reader import SafetensorsReader

PAGE = 4096
NUM_PAGES = 16 << 10  # of each tensor, 64 MB
AHEAD = NUM_PAGES // 4  # pages that the kernel reads ahead of those that are touched, at most
NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "x.safetensors"
    numbers = torch.arange(NUM_PAGES * PAGE // 4).to(torch.float32)
    save_file({name: numbers + i for i, name in enumerate(NAMES)}, path)
    return path


@pytest.fixture
def evicted(file: Path) -> Path:
    """On the disk and out of the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if num_resident(SafetensorsReader(file).read("b")) > AHEAD:
        pytest.skip("this file system keeps all of its pages in memory")
    return file


def num_resident(tensor: torch.Tensor) -> int:
    first = -(-tensor.data_ptr() // PAGE)
    num_pages = (tensor.data_ptr() + tensor.nbytes) // PAGE - first
    return num_pages - int(page_cache._missing(first, num_pages).sum())


@pytest.fixture
def mapped(evicted: Path) -> torch.Tensor:
    return SafetensorsReader(evicted).read("b")


def test_pages_come_and_go(mapped: torch.Tensor) -> None:
    brought = BroughtPages().bring_in(mapped)
    assert num_resident(mapped) >= NUM_PAGES - 1
    before = mapped.clone()
    give_back(brought)
    assert num_resident(mapped) <= AHEAD
    assert torch.equal(mapped, before), "it is read again"


def test_pages_that_were_there_stay(mapped: torch.Tensor) -> None:
    """As another program that reads the same file wants them."""
    half, rest = mapped.chunk(2)
    assert half.max() > 0
    num_read_ahead = num_resident(rest)
    give_back(BroughtPages().bring_in(mapped))
    assert num_resident(half) >= NUM_PAGES // 2 - 1
    assert num_resident(rest) <= num_read_ahead


def test_memory_of_no_file_is_left_alone() -> None:
    tensor = torch.arange(NUM_PAGES * PAGE // 8)
    give_back(BroughtPages().bring_in(tensor))
    assert torch.equal(tensor, torch.arange(NUM_PAGES * PAGE // 8))
    assert num_resident(tensor) >= NUM_PAGES - 1
    assert (
        BroughtPages().bring_in(torch.ones(8))
        == BroughtPages().bring_in(tensor.view(-1, 8).t())
        == []
    )


@pytest.mark.parametrize("name", ["mincore", "madvise"])
def test_a_kernel_that_refuses_changes_nothing(
    mapped: torch.Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __getattr__(self, called: str) -> Callable[..., int]:
            real: Callable[..., int] = getattr(libc, called)
            return (lambda *_: -1) if called == name else real

    libc = page_cache._libc
    monkeypatch.setattr(page_cache, "_libc", Refusing())
    give_back(BroughtPages().bring_in(mapped))
    monkeypatch.undo()
    assert num_resident(mapped) >= NUM_PAGES - 1


class Files:
    """A `WeightSource` over one file."""

    def __init__(self, path: Path) -> None:
        self._reader = SafetensorsReader(path)

    def read(self, name: str) -> torch.Tensor:
        return self._reader.read(name)


def test_a_unit_is_given_back_after_the_next_one(evicted: Path) -> None:
    """By then nothing of it waits to be written."""
    source = Files(evicted)
    tensors = {name: source.read(name) for name in NAMES}
    with ReadAhead(source, NAMES, max_bytes=0) as reader:  # type: ignore[arg-type]
        for unit in (["a", "b"], ["c"]):
            for name in unit:
                assert torch.equal(reader.read(name), tensors[name])
            reader.end_unit()
        counts = {name: num_resident(tensors[name]) for name in "abc"}
        assert max(counts["a"], counts["b"]) <= AHEAD, counts
        assert counts["c"] >= NUM_PAGES - 1
    assert max(num_resident(tensors[name]) for name in NAMES) <= AHEAD
