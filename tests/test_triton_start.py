"""Starting a Triton server that cannot start: one line, exit code 2, nothing left running."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from pathlib import Path

from tests.command import Result, one_line_error
from tests.conftest import FP32, Workshop
from tests.ranks import engine_of
from tests.triton_server import start


def ended(engine_dir: Path, folder: Path, *flags: object) -> Result:
    log = folder / "log"
    process, _ = start(engine_dir, log, *flags)
    code = process.wait(150)
    assert not list(Path("/dev/shm").glob(f"nvlm_{process.pid}_*"))
    return Result(code, "", log.read_text())


def test_a_directory_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    one_line_error(ended(tmp_path, tmp_path), str(tmp_path), "no manifest.json")


def test_an_engine_of_several_ranks_for_decoder_torch_is_refused(
    workshop: Workshop, tmp_path: Path
) -> None:
    result = ended(engine_of(workshop, 2, FP32), tmp_path)
    one_line_error(result, "for 2 ranks", "--tp_size 1", "--decoder tensorrt_llm")


def test_a_port_in_use_is_told(engine_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ended(engine_dir, tmp_path, "--http_port", port)
    one_line_error(result, str(port), "in use", "--http_port")


def test_a_server_that_is_not_ready_in_time_is_stopped(engine_dir: Path, tmp_path: Path) -> None:
    result = ended(engine_dir, tmp_path, "--startup_timeout_s", "0.3")
    one_line_error(result, "not ready after 0.3 s", "--startup_timeout_s")


def test_a_model_that_cannot_be_loaded_is_told(engine_dir: Path, tmp_path: Path) -> None:
    """Here is no TensorRT-LLM."""
    result = ended(engine_dir, tmp_path, "--form", "tensorrt_llm", "--startup_timeout_s", "120")
    one_line_error(result, "tensorrtllm")


def test_a_server_that_dies_is_told_and_cleaned_up(engine_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, _ = start(engine_dir, log)
    end = time.monotonic() + 150
    while "ready:" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (triton,) = [int(child) for child in children]
    os.kill(triton, signal.SIGKILL)
    assert process.wait(150) == 2
    told = log.read_text()
    assert re.search(r"^error: tritonserver ended by itself with -9", told, re.MULTILINE)
