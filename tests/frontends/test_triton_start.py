"""Starting a Triton server that cannot start: one line, exit code 2, nothing left running."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sysconfig
import threading
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from build.conversion.convert import ConvertOptions
from frontends.triton.server import Ports, TritonServer
from nvlm.program.command_line import EXIT_PART_DIED
from nvlm.program.errors import UserError
from tests.conftest import FP32, Workshop
from tests.support.command import ROOT, Result, one_line_error, run_command
from tests.support.ranks import engine_of
from tests.support.triton_server import free_ports, start


def ended(engine_dir: Path, *flags: object) -> Result:
    """What `python -m frontends.triton.serve` says, run in this process."""
    names = ("--http_port", "--grpc_port", "--metrics_port")
    ports = [flag for pair in zip(names, free_ports(3), strict=True) for flag in pair]
    given = ("--engine_dir", engine_dir, "--device", "cpu", *ports, *flags)
    result = run_command("frontends/triton/serve", *given)
    assert not list(Path("/dev/shm").glob(f"nvlm_{os.getpid()}_*"))
    return result


def kept_log(error: str) -> str:
    """What the server's log held, from the copy that the error names; which it removes."""
    printed = re.search(r"its log is kept in (\S+)$", error)
    assert printed is not None, error
    path = Path(printed[1])
    text = path.read_text(errors="replace")
    path.unlink()
    return text


def test_a_directory_that_is_no_engine_is_refused(tmp_path: Path) -> None:
    one_line_error(ended(tmp_path), str(tmp_path), "no manifest.json")


def test_an_engine_of_several_ranks_for_decoder_torch_is_refused(workshop: Workshop) -> None:
    result = ended(engine_of(workshop, 2, FP32))
    one_line_error(result, "for 2 ranks", "--tp_size 1", "--decoder tensorrt_llm")


def test_a_port_in_use_is_reported(engine_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = ended(engine_dir, "--http_port", port)
    one_line_error(result, str(port), "in use", "--http_port")


@pytest.mark.parametrize("value", ["-1", "0", "many"])
def test_a_number_of_threads_is_checked_before_anything_starts(
    engine_dir: Path, value: str
) -> None:
    result = ended(engine_dir, f"--num_threads={value}")
    one_line_error(result, "--num_threads", f"is '{value}', expected a positive integer")


def test_a_server_that_is_not_ready_in_time_is_stopped(engine_dir: Path) -> None:
    result = ended(engine_dir, "--startup_timeout_s", "0.3")
    line = one_line_error(result, "not ready after 0.3 s", "--startup_timeout_s")
    kept_log(line)


def test_a_model_that_cannot_be_loaded_is_reported(engine_dir: Path) -> None:
    """Here is no TensorRT-LLM."""
    result = ended(engine_dir, "--form", "tensorrt_llm", "--startup_timeout_s", "120")
    line = one_line_error(result, "tensorrtllm")
    assert "failed to load 'tensorrt_llm'" in kept_log(line)


def test_a_server_that_dies_is_reported_and_its_log_kept(engine_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process, _ = start(engine_dir, log)
    end = time.monotonic() + 150
    while "ready:" not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (triton,) = [int(child) for child in children]
    os.kill(triton, signal.SIGKILL)
    assert process.wait(150) == EXIT_PART_DIED
    assert running_in_group(triton) == [], "its backends are left"
    printed = re.search(r"^error: tritonserver was ended by SIGKILL.*$", log.read_text(), re.M)
    assert printed is not None, log.read_text()
    assert "Started GRPCInferenceService" in kept_log(printed[0])


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 130)])
def test_a_server_that_is_stopped_leaves_nothing(
    engine_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_number: int,
    code: int,
) -> None:
    """By a service manager, which takes 0 for success, or by an ssh session that ends."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    process, _ = start(engine_dir, tmp_path / "log")
    end = time.monotonic() + 60
    while not list(scratch.glob("nvlm_triton_*/*.log")):
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(signal_number)
    assert process.wait(150) == code, (tmp_path / "log").read_text()
    assert list(scratch.glob("nvlm_triton_*")) == []


def test_a_log_file_is_kept_and_appended_to(engine_dir: Path, tmp_path: Path) -> None:
    """SIGTERM ends a server that serves with 0 too."""
    log = tmp_path / "triton.log"
    log.write_text("from before\n")
    process, _ = start(engine_dir, tmp_path / "output", "--log_file", log)
    end = time.monotonic() + 150
    while f"log {log};" not in (tmp_path / "output").read_text():
        assert time.monotonic() < end, (tmp_path / "output").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    text = log.read_text()
    assert text.startswith("from before\n")
    assert re.search(r"nvlm: request #1: length after 1 tokens, \d+ of prompt, 0 tiles", text)


def test_a_log_file_that_cannot_be_written_is_reported(engine_dir: Path, tmp_path: Path) -> None:
    result = ended(engine_dir, "--log_file", tmp_path / "missing" / "log")
    one_line_error(result, "--log_file", "No such file")


def test_a_folder_for_the_repository_that_is_not_ascii_is_reported(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "Prüfstand"))
    (tmp_path / "Prüfstand").mkdir()
    one_line_error(ended(engine_dir), "Prüfstand", "expected ASCII", "TMPDIR")


def test_project_environment_and_engine_in_folders_that_are_not_ascii_serve(
    engine_dir: Path, tmp_path: Path
) -> None:
    """The backend's Python takes file names for ASCII."""
    project = tmp_path / "Prüfstand 模型"
    for room in ("nvlm", "build", "runtime", "frontends"):
        shutil.copytree(ROOT / room, project / room)
    engine = shutil.copytree(engine_dir, project / "engine é")
    environment = project / ".venv"
    venv.create(environment, symlinks=True)
    (packages,) = (environment / "lib").glob("python3*/site-packages")
    packages.rmdir()
    packages.symlink_to(sysconfig.get_path("purelib"))
    log = tmp_path / "log"
    process, _ = start(engine, log, python=environment / "bin" / "python", cwd=project)
    end = time.monotonic() + 150
    while "ready:" not in log.read_text():  # it has answered
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def running_in_group(group: int) -> list[str]:
    """Command lines of its processes that are not yet dead."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, process_group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append((process / "cmdline").read_text())
    return found


class TestRanks:
    """An engine of two ranks, whose servers `mpirun` starts."""

    @pytest.fixture
    def two_ranks(self, workshop: Workshop, model_dir: Path) -> Path:
        options = ConvertOptions(quant_algo=None, kv_cache_quant_algo=None, tp_size=2)
        checkpoint = workshop.checkpoint("checkpoint_two_ranks", model_dir, options)
        return workshop.engine("engine_two_ranks", checkpoint, decoder="torch", vision="torch")

    def test_without_mpirun_it_is_reported(
        self, two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        result = ended(two_ranks, "--form", "tensorrt_llm")
        one_line_error(result, "the engine has 2 ranks", "mpirun", "not installed")

    def test_mpirun_starts_a_server_a_rank(
        self, two_ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that only says what it was given."""
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "mpirun"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        result = ended(two_ranks, "--form", "tensorrt_llm")
        kept_log(one_line_error(result, "tritonserver ended while starting"))
        leader, worker = (tmp_path / "given").read_text().split(" : ")
        assert "/tritonserver --" in leader
        assert "--load-model=tensorrt_llm" in worker


@contextmanager
def answering(status: int, body: bytes, *, silent: bool = False) -> Iterator[TritonServer]:
    """A `TritonServer` whose server is healthy and gives every question this answer, or none."""
    asked = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert question["max_tokens"] == 1, "a real inference"
            asked.set()
            if silent:
                time.sleep(2)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = TritonServer.__new__(TritonServer)  # no process
    server._prefix = f"nvlm_{os.getpid()}_none_"
    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        server.ports = Ports(http=http.server_port)
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
            assert asked.is_set(), "ready without an inference"
        finally:
            http.shutdown()
            thread.join()


class TestReadiness:
    """A server is ready when it has answered a question, not when it says so."""

    @pytest.mark.parametrize("answer", [{"num_tokens": 1}, {"finish_reason": "stop"}])
    def test_an_answer_is_enough(self, answer: dict[str, object]) -> None:
        with answering(200, json.dumps(answer).encode()) as server:
            server.wait_until_ready(5)

    @pytest.mark.parametrize(
        ("status", "body", "message"),
        [
            (400, b'{"error": "no such table"}', "is up but cannot answer: .*no such table"),
            (200, b'{"num_tokens": 7}', "is up but answers .*7.*expected one token"),
        ],
    )
    def test_an_error_and_nonsense_are_reported(
        self, status: int, body: bytes, message: str
    ) -> None:
        with answering(status, body) as server, pytest.raises(UserError, match=message):
            server.wait_until_ready(5)

    def test_no_proxy_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nobody listens at that port."""
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{free_ports(1)[0]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with answering(200, b'{"num_tokens": 1}') as server:
            server.wait_until_ready(5)

    def test_silence_is_reported_when_the_deadline_is_over(self) -> None:
        with (
            answering(200, b"{}", silent=True) as server,
            pytest.raises(UserError, match="is up but does not answer: timed out"),
        ):
            server.wait_until_ready(1)
