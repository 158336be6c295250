"""A real server of which a part dies under load: noticed, answered, ended with code 3 or healed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nvlm.formats import layout
from nvlm.program.command_line import EXIT_PART_DIED, EXIT_USER_ERROR
from tests.frontends.test_triton_start import kept_log, running_in_group
from tests.support.command import ROOT
from tests.support.sabotage import END_DECODER, HANG_DECODER, Sabotaged
from tests.support.triton_server import Served, start

NUM_IN_FLIGHT = 16
NOTICED_S, ANSWERED_S = 5.0, 10.0
BUSY = 6.0
"""A machine that does other things may take so many times as long. What waits for a limit would
take minutes."""
WAIT_S = 150


def children_of(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


class Serving:
    """A server and its processes; what it says is in `log`."""

    def __init__(self, engine_dir: Path, folder: Path, *flags: object, cwd: Path = ROOT) -> None:
        self.log = folder / "serve.log"
        self.process, ports = start(engine_dir, self.log, *flags, cwd=cwd)
        self.served = Served(self.process, *ports, self.log)

    def wait_for(self, pattern: str, number: int = 1) -> re.Match[str]:
        """The `number`th line that holds `pattern`."""
        end = time.monotonic() + WAIT_S
        while len(found := list(re.finditer(pattern, self.log.read_text()))) < number:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        return found[number - 1]

    @property
    def tritonserver(self) -> int:
        (pid,) = children_of(self.process.pid)
        return pid

    @property
    def model_process(self) -> int:
        (pid,) = children_of(self.tritonserver)
        return pid


@contextmanager
def serving(engine_dir: Path, folder: Path, *flags: object, cwd: Path = ROOT) -> Iterator[Serving]:
    serving = Serving(engine_dir, folder, *flags, cwd=cwd)
    try:
        serving.wait_for("ready: ")
        yield serving
    finally:
        serving.process.terminate()
        serving.process.wait(60)


@contextmanager
def asking(served: Served) -> Iterator[list[Future[float]]]:
    """Clients with a request in flight; each becomes the time at which it got an error. Whoever is
    answered asks again: some answers end before the server does."""

    def ask() -> float:
        last = time.monotonic() + WAIT_S
        while time.monotonic() < last:
            try:
                answer = served.generate(text_input="Tell me everything.", max_tokens=1800)
            except OSError:  # the connection ended
                return time.monotonic()
            if "error" in answer:
                return time.monotonic()
        raise AssertionError("every request was answered")

    with ThreadPoolExecutor(NUM_IN_FLIGHT) as pool:
        asked = [pool.submit(ask) for _ in range(NUM_IN_FLIGHT)]
        served.wait_for_sample("nvlm_requests_running", 8)
        yield asked


def assert_ended(serving: Serving, group: int, *fragments: str) -> None:
    """With its own code and one line, and nothing of it is left."""
    assert serving.process.wait(WAIT_S) == EXIT_PART_DIED
    errors = re.findall(r"^error: .*$", serving.log.read_text(), re.MULTILINE)
    assert len(errors) == 1, serving.log.read_text()
    for fragment in fragments:
        assert fragment in errors[0]
    assert "Traceback" not in errors[0]
    found = errors[0].partition("; its log")[0]  # whose name is drawn
    assert not re.search(r"\d# |0x[0-9a-f]", found), "a stack frame"
    kept_log(errors[0])
    assert running_in_group(group) == []
    assert list(Path("/dev/shm").glob(f"nvlm_{serving.process.pid}_*")) == []


Break = Callable[[Serving], None]

DEATHS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "model process": (
        lambda serving: os.kill(serving.model_process, signal.SIGKILL),
        ("the process of model nvlm was ended by SIGKILL (killed by someone, or by the system",),
    ),
    "tritonserver": (
        lambda serving: os.kill(serving.tritonserver, signal.SIGSEGV),
        ("tritonserver was ended by SIGSEGV (a fault in a library's machine code)",),
    ),
}


@pytest.mark.parametrize("part", DEATHS)
def test_a_dead_process_is_noticed_and_no_request_is_left_without_an_answer(
    float32_engine_dir: Path, tmp_path: Path, part: str
) -> None:
    kill, fragments = DEATHS[part]
    with serving(float32_engine_dir, tmp_path) as server:
        group = server.tritonserver
        with asking(server.served) as asked:
            killed = time.monotonic()
            kill(server)
            ends = [request.result(WAIT_S) for request in asked]
        assert max(ends) - killed < BUSY * ANSWERED_S
        assert_ended(server, group, *fragments)
        assert time.monotonic() - killed < BUSY * (NOTICED_S + ANSWERED_S)


@pytest.mark.parametrize(
    ("order", "flags", "message"),
    [
        (END_DECODER, (), "the decoder's thread has ended: SystemExit"),
        (
            HANG_DECODER,
            ("--hang_after_s", 10),
            "the decoder's thread has made no progress for 10 s",
        ),
    ],
    ids=["dead", "hangs"],
)
def test_so_is_the_decoders_thread(
    float32_engine_dir: Path, tmp_path: Path, order: str, flags: tuple[object, ...], message: str
) -> None:
    sabotaged = Sabotaged(tmp_path)
    with serving(float32_engine_dir, tmp_path, *flags, cwd=sabotaged.folder) as server:
        group = server.tritonserver
        with asking(server.served) as asked:
            sabotaged.order(order)
            for request in asked:
                request.result(WAIT_S)
        assert_ended(server, group, message)


@pytest.mark.slow
def test_a_model_process_that_is_stopped_hangs_by_the_limit(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    with serving(float32_engine_dir, tmp_path, "--hang_after_s", 10) as server:
        group = server.tritonserver
        with asking(server.served) as asked:
            os.kill(server.model_process, signal.SIGSTOP)
            for request in asked:
                request.result(WAIT_S)
        assert_ended(server, group, "the process of model nvlm has given no sign of life for 10 s")


@pytest.mark.slow
def test_with_restart_a_server_comes_back_and_answers_as_before(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    """Until a part has died too often."""
    with serving(float32_engine_dir, tmp_path, "--restart") as server:
        question = {"text_input": "Well?", "max_tokens": 9}
        before = server.served.generate(**question)["text_output"]
        for number in range(2, 5):
            os.kill(server.model_process, signal.SIGKILL)
            printed = server.wait_for(
                "starting again: .* was ended by SIGKILL.*kept in", number - 1
            )
            kept_log(server.log.read_text()[printed.start() :].splitlines()[0])
            server.wait_for("ready: ", number)
            assert server.served.generate(**question)["text_output"] == before
        group = server.tritonserver
        os.kill(server.model_process, signal.SIGKILL)
        assert_ended(server, group, "that was start 4 within 10 minutes")


@pytest.mark.slow
def test_a_server_that_rests_under_a_short_limit_does_not_hang(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    """Nothing but heartbeats for longer than the limit."""
    with serving(float32_engine_dir, tmp_path, "--hang_after_s", 10) as server:
        assert not threading.Event().wait(25)
        assert server.process.poll() is None, server.log.read_text()
        assert server.served.generate(text_input="Well?", max_tokens=2)["num_tokens"] == 2


def test_an_engine_that_is_changed_ends_the_server_as_a_mistake(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    """While nobody asks; and with --restart too, which would not heal it."""
    engine = shutil.copytree(float32_engine_dir, tmp_path / "engine")
    with serving(engine, tmp_path, "--restart") as server:
        rank = engine / layout.LLM / layout.rank_file(0)
        with open(rank, "r+b") as file:
            file.seek(-50_000, os.SEEK_END)
            file.write(bytes(50_000))
        assert server.process.wait(WAIT_S) == EXIT_USER_ERROR
        printed = server.wait_for(r"error: .*its log is kept in .*")[0]
        assert f"{rank} was changed or replaced while" in printed
        kept_log(printed)
