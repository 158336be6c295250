"""Direct writes give the bytes of cached ones, wherever blocks begin and whatever is refused."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from build.conversion.output_files import OutputFiles
from build.output import direct_file
from build.output.direct_file import DirectFile
from nvlm.formats.safetensors_reader import TensorInfo

PAGE = mmap.PAGESIZE
SIZE = 40 * PAGE + 123
Pwrite = Callable[[int, memoryview, int], int]
DATA = random.Random(0).randbytes(SIZE)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few pages are written in several direct pieces."""
    monkeypatch.setattr(direct_file, "_BUFFER_BYTES", 4 * PAGE)
    monkeypatch.setattr(direct_file, "_MIN_BYTES", PAGE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    return path


def blocks(seed: int) -> Iterator[tuple[int, memoryview]]:
    """All of `DATA` in pieces of any length, with their offsets, in any order."""
    drawn = random.Random(seed)
    cuts = sorted({0, SIZE, *(drawn.randrange(SIZE) for _ in range(12)), 8 * PAGE, 16 * PAGE})
    pieces = [(start, memoryview(DATA)[start:end]) for start, end in pairwise(cuts)]
    return iter(drawn.sample(pieces, len(pieces)))


def write_all(path: Path, seed: int) -> None:
    file = DirectFile(path, 0)
    for offset, data in blocks(seed):
        file.write_at(offset, data)
    file.sync()
    file.close()


def opens_directly(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("seed", range(4))
def test_any_blocks_in_any_order_are_written_as_given(path: Path, seed: int) -> None:
    write_all(path, seed)
    assert path.read_bytes() == DATA


def test_whole_pages_go_directly_and_the_ends_of_a_block_do_not(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not opens_directly(path):
        pytest.skip("this file system refuses direct writes")
    file, written = DirectFile(path, 0), []

    def pwrite(fd: int, data: memoryview, offset: int, original: Pwrite = os.pwrite) -> int:
        written.append((fd == file.fd, offset, len(data)))
        return original(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    file.write_at(100, memoryview(DATA)[100 : 7 * PAGE + 5])
    file.close()
    assert written == [
        (True, 100, PAGE - 100),
        (False, PAGE, 4 * PAGE),
        (False, 5 * PAGE, 2 * PAGE),
        (True, 7 * PAGE, 5),
    ]


def test_a_file_system_that_opens_no_file_directly_gets_cached_writes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(
        path: Path, flags: int, mode: int = 0o777, original: Callable[..., int] = os.open
    ) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct access")
        return original(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    write_all(path, 0)
    assert path.read_bytes() == DATA


def flags_of(fd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))


def test_a_write_that_is_refused_is_done_through_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may ask for more than whole pages."""

    def pwrite(fd: int, data: memoryview, offset: int, original: Pwrite = os.pwrite) -> int:
        if flags_of(fd) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not aligned")
        return original(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_all(path, 0)
    assert path.read_bytes() == DATA


def test_a_write_that_ends_early_is_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(fd: int, data: memoryview, offset: int, original: Pwrite = os.pwrite) -> int:
        is_direct = flags_of(fd) & os.O_DIRECT
        return original(fd, data[:PAGE] if is_direct else data[:1000], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    write_all(path, 0)
    assert path.read_bytes() == DATA


def test_files_of_a_conversion_share_a_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion's memory does not depend on the number of ranks."""
    taken = list[mmap.mmap]()

    def take(*arguments: int, original: Callable[..., mmap.mmap] = mmap.mmap) -> mmap.mmap:
        taken.append(original(*arguments))
        return taken[-1]

    monkeypatch.setattr(mmap, "mmap", take)
    rows = torch.arange(2.0 * PAGE)
    infos = {"a": TensorInfo(rows.dtype, (len(rows),)), "b": TensorInfo(rows.dtype, (1,))}
    files = [f"rank{rank}.safetensors" for rank in range(4)]
    with OutputFiles(tmp_path, dict.fromkeys(files, infos), None, 0) as out:
        for name, block in (("a", rows), ("b", rows[:1])):
            for file in files:
                out.append(file, name, block)
    assert len(taken) == 1
    assert torch.equal(load_file(tmp_path / files[-1])["a"], rows)


def test_a_full_disk_is_passed_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pwrite(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OSError, match="No space left"):
        write_all(path, 0)
