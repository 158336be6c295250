"""What `make check` leaves out is known by markers, and a test cannot forget its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from tests.conftest import HAS_HOPPER, MARKS
from tests.support.command import ROOT

START: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run([sys.executable, "-c", ""], check=True),
    "fork": os.fork,
    "system": lambda: os.system("true"),
    "fork server": lambda: multiprocessing.get_context("forkserver").Process().start(),
}


on_watch = pytest.mark.skipif(torch.cuda.is_available(), reason="the guard rests beside a GPU")


@on_watch
@pytest.mark.parametrize("start", START.values(), ids=START)
def test_an_unmarked_test_that_starts_a_process_fails(start: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match="mark it `process`"):
        start()


@pytest.mark.skipif(HAS_HOPPER, reason="kernels run on the GPU here")
def test_an_unmarked_test_that_interprets_a_kernel_fails() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from runtime.kernels.quantization import quantize_tensor

    with pytest.raises(pytest.fail.Exception, match="mark it `kernels`"):
        quantize_tensor(torch.ones(1, 16), torch.ones(1))


@pytest.mark.process
def test_a_marked_test_may_start_processes() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


def test_every_row_of_the_marks_names_a_file_or_a_folder() -> None:
    assert [path for path in MARKS if not (ROOT / "tests" / path).exists()] == []
