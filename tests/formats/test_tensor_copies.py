"""Copies by threads have the bits of plain reading, in bounded memory, and end with their context.

The threads run here with a CPU as their device; tests/decoder/test_hopper_kernels_model.py loads
onto a GPU."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvlm.formats import tensor_copies
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_copies import DirectCopies, FileCopies, copies_of
from nvlm.program.errors import UserError
from tests.support.command import ROOT

CPU = torch.device("cpu")

# As rank 1 of a machine loads. Prints whether GPU 0 has a context of this process.
_RANK_1 = """
import sys
from pathlib import Path
import torch
from nvlm.formats.safetensors_reader import SafetensorsReader
from nvlm.formats.tensor_copies import FileCopies

device = torch.device("cuda", 1)
torch.cuda.set_device(device)
reader = SafetensorsReader(Path(sys.argv[1]))
with FileCopies(reader, device, piece_bytes=4096) as copies:
    found = copies.read("wide")
assert torch.equal(found.cpu(), reader.read("wide"))
print(torch._C._cuda_hasPrimaryContext(0))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(301, 97, generator=generator),
        "half": torch.randn(64, 33, generator=generator).bfloat16(),
        "fp8": torch.randn(48, 80, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(0.25),
        "one": torch.ones(1, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("num_threads", [1, 3, 8])
@pytest.mark.parametrize("piece_bytes", [37, 1000, 4096, 1 << 20])
def test_bits_are_those_of_the_file(path: Path, num_threads: int, piece_bytes: int) -> None:
    reader = SafetensorsReader(path)
    with FileCopies(reader, CPU, num_threads=num_threads, piece_bytes=piece_bytes) as copies:
        found = {name: copies.read(name) for name in reader.tensors}
    for name, tensor in load_file(path).items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        assert torch.equal(bits(found[name]), bits(tensor)), name


def test_who_loads_in_inference_mode_gets_its_tensors(path: Path) -> None:
    """torch's modes are a thread's own, and these threads write what their caller made."""
    reader = SafetensorsReader(path)
    with torch.inference_mode(), FileCopies(reader, CPU, num_threads=2) as copies:
        found = {name: copies.read(name) for name in reader.tensors}
    for name, tensor in load_file(path).items():
        assert torch.equal(bits(found[name]), bits(tensor)), name


def test_tensors_come_into_parts_of_one(path: Path) -> None:
    """As gate and up do."""
    whole, wide = torch.zeros(602, 97), load_file(path)["wide"]
    with FileCopies(SafetensorsReader(path), CPU, piece_bytes=4096) as copies:
        for part in whole.split(301):
            copies.read_into("wide", part)
        copies.wait()
        assert torch.equal(whole, torch.cat([wide, wide]))


def test_another_type_or_shape_is_not_copied(path: Path) -> None:
    reader = SafetensorsReader(path)
    with FileCopies(reader, CPU) as copies, pytest.raises(AssertionError, match="as it is stored"):
        copies.read_into("half", torch.empty(64, 33))
    with FileCopies(reader, CPU) as copies, pytest.raises(AssertionError, match="another shape"):
        copies.read_into("wide", torch.empty(97, 301))


def test_host_memory_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(tensor_copies._Buffer):
        def __init__(self, num_bytes: int, stream: torch.cuda.Stream | None) -> None:
            made.append(num_bytes)
            super().__init__(num_bytes, stream)

    monkeypatch.setattr(tensor_copies, "_Buffer", Counted)
    with FileCopies(SafetensorsReader(path), CPU, num_threads=2, piece_bytes=100) as copies:
        for _ in range(3):
            copies.read("wide")
    assert 0 < len(made) <= 2 * 2
    assert set(made) == {100}


def test_a_file_that_was_cut_short_is_one_line(path: Path) -> None:
    reader, before = SafetensorsReader(path), threading.active_count()
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 50_000)
    with (
        pytest.raises(UserError, match=r"is not a whole safetensors file \(it ends at \d+\)"),
        FileCopies(reader, CPU, num_threads=3, piece_bytes=512) as copies,
    ):
        for name in reader.tensors:
            copies.read(name)
    assert threading.active_count() == before


def test_an_error_inside_ends_the_threads(path: Path) -> None:
    reader, before = SafetensorsReader(path), threading.active_count()
    with (
        pytest.raises(RuntimeError, match="inside"),
        FileCopies(reader, CPU, piece_bytes=64) as copies,
    ):
        copies.read("wide")
        raise RuntimeError("inside")
    assert threading.active_count() == before


def test_a_thread_that_cannot_start_is_the_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container with few processes."""
    reader, before = SafetensorsReader(path), threading.active_count()
    start, num_started = threading.Thread.start, 0

    def limited(thread: threading.Thread) -> None:
        nonlocal num_started
        num_started += 1
        if num_started == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with (
        pytest.raises(RuntimeError, match="can't start new thread"),
        FileCopies(reader, CPU, num_threads=4, piece_bytes=64) as copies,
    ):
        copies.read("wide")
    assert threading.active_count() == before


def test_a_thread_ends_where_control_c_comes_between_its_start_and_the_next_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, before = SafetensorsReader(path), threading.active_count()
    start, started = threading.Thread.start, list[threading.Thread]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        FileCopies(reader, CPU, num_threads=4, piece_bytes=64) as copies,
    ):
        copies.read("wide")
    for thread in started:
        thread.join(10)
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.process
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_ranks_threads_leave_no_context_on_gpu_0(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RANK_1, path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_a_cpu_maps_a_file(path: Path) -> None:
    reader = SafetensorsReader(path)
    with copies_of(reader, CPU) as copies:
        assert isinstance(copies, DirectCopies)
        assert copies.read("wide").data_ptr() == copies.read("wide").data_ptr()
        target = torch.empty(301, 97)
        copies.read_into("wide", target)
    assert torch.equal(target, load_file(path)["wide"])
