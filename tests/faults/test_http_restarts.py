"""serve.py --restart: the server comes back on its port and answers as before, until it has died
too often."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvlm.program.command_line import EXIT_PART_DIED, EXIT_USER_ERROR
from nvlm.program.restarts import MOST
from tests.conftest import FP32, Workshop
from tests.faults.http_deaths import QUEUE, WAIT_S, under_load
from tests.faults.load import NUM_CLIENTS
from tests.faults.test_http_deaths import assert_reported
from tests.support.command import ROOT
from tests.support.http_server import Served, serving
from tests.support.ranks import command, engine_of, finished, needs_mpi
from tests.support.sabotage import END_DECODER, HTTP_SERVER, Sabotaged

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="requirements/serving.txt is not installed")

START = ("--device", "cpu", "--port", "0", "--restart")


def server_process(served: Served) -> int:
    """The one child of the supervisor."""
    supervisor = served.process.pid
    (pid,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return int(pid)


def wait_for(served: Served, what: str, number: int) -> None:
    end = time.monotonic() + WAIT_S
    while served.log.read_text().count(what) < number:
        assert time.monotonic() < end, served.log.read_text()
        time.sleep(0.05)


def test_the_decoders_thread_dies_under_load_and_the_server_comes_back(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    sabotaged = Sabotaged(tmp_path, HTTP_SERVER)
    flags, cwd = (*QUEUE, "--restart"), sabotaged.folder
    with serving(float32_engine_dir, tmp_path, *flags, cwd=cwd, is_killed=True) as served:
        before = served.ask()["choices"]
        death = under_load(served, NUM_CLIENTS, lambda: sabotaged.order(END_DECODER))
        assert_reported(death)
        wait_for(served, "ready: ", 2)
        assert served.health() == 200
        assert served.ask()["choices"] == before
    lines = served.log.read_text().splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert "the decoder's thread has ended: SystemExit" in error
    assert "starting again: the server ended with exit code 3" in lines


@pytest.mark.slow
def test_a_killed_server_comes_back_until_it_has_died_too_often(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    flags, code = ("--restart",), EXIT_PART_DIED
    with serving(float32_engine_dir, tmp_path, *flags, code=code) as served:
        before = served.ask()["choices"]
        for number in range(2, MOST + 2):
            os.kill(server_process(served), signal.SIGKILL)
            wait_for(served, "ready: ", number)
            assert served.ask()["choices"] == before
        os.kill(server_process(served), signal.SIGKILL)
    log = served.log.read_text()
    assert log.count("starting again: the server ended by SIGKILL") == MOST
    assert f"that was start {MOST + 1} within 10 minutes" in log.splitlines()[-1]


@pytest.mark.slow
def test_a_server_ends_with_its_supervisor(float32_engine_dir: Path, tmp_path: Path) -> None:
    with serving(float32_engine_dir, tmp_path, "--restart", code=-signal.SIGKILL) as served:
        pid = server_process(served)
        served.process.kill()
        end = time.monotonic() + WAIT_S
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


def test_a_mistake_is_not_healed_by_another_start(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "serve.py", "--engine_dir", tmp_path / "none", *START]
    result = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S)
    assert result.returncode == EXIT_USER_ERROR
    errors = [line for line in result.stderr.splitlines() if not line.startswith("start-up: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")


@needs_mpi
@pytest.mark.mpi
def test_ranks_are_started_by_their_launcher(workshop: Workshop, tmp_path: Path) -> None:
    engine_dir = engine_of(workshop, 2, FP32)
    words = command(2, ROOT / "serve.py", "--engine_dir", engine_dir, *START)
    result = finished(words, tmp_path)
    assert result.returncode == EXIT_USER_ERROR
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "found 2 ranks" in line
