"""What the program that starts Triton hears of a model's process: life, silence, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontends.triton.model_pipe import End, ModelPipe
from frontends.triton.models.heartbeat import Heartbeat
from nvlm.program.errors import PartDiedError, UserError
from nvlm.program.signal_names import how_a_zombie_ended, how_it_ended


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[ModelPipe]:
    pipe = ModelPipe(tmp_path, "nvlm", hang_after_s=10.0)
    yield pipe
    pipe.close()


def test_nobody_who_has_not_begun_is_dead_or_silent(pipe: ModelPipe) -> None:
    """A large engine loads for minutes."""
    assert [pipe.look(60.0) for _ in range(5)] == [None] * 5


def test_silence_is_counted_between_signs_of_life(pipe: ModelPipe) -> None:
    with open(pipe.path, "wb", buffering=0) as process:
        for _ in range(3):
            process.write(b'{"pid": 1}\n')
            assert pipe.look(9.0) is None
            assert pipe.look(9.0) is None
        end = pipe.look(9.0)
        assert end is not None
        assert "no sign of life for 10 s" in end.reason
        assert not end.is_answered


@pytest.mark.parametrize(
    ("error", "is_mistake"), [(PartDiedError("it broke"), False), (UserError("changed"), True)]
)
def test_a_process_says_itself_why_it_ends(
    pipe: ModelPipe, error: Exception, is_mistake: bool
) -> None:
    heartbeat = Heartbeat(str(pipe.path))
    heartbeat.end(error)
    assert pipe.look(0.5) == End(str(error), is_mistake, is_answered=True)
    heartbeat.leave()


def test_one_that_leaves_is_not_dead(pipe: ModelPipe) -> None:
    heartbeat = Heartbeat(str(pipe.path))
    heartbeat.leave()
    assert heartbeat._fd is not None
    os.close(heartbeat._fd)
    heartbeat._fd = None
    assert [pipe.look(60.0) for _ in range(3)] == [None] * 3


def test_without_a_reader_nothing_is_said_and_nothing_fails(tmp_path: Path) -> None:
    """A repository that somebody serves by hand."""
    for path in (tmp_path / "missing", tmp_path):
        Heartbeat(str(path)).leave()


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_process_that_is_gone_is_reported_with_the_name_of_its_signal(
    pipe: ModelPipe, number: signal.Signals
) -> None:
    script = f'exec 3> "$0"; echo "{{\\"pid\\": $$}}" >&3; kill -{int(number)} $$'
    process = subprocess.Popen(["sh", "-c", script, str(pipe.path)])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    end = pipe.look(0.5) or pipe.look(0.5)
    assert end is not None
    assert f"the process of model nvlm was ended by {number.name}" in end.reason
    process.wait()


def test_signals_have_names_and_what_they_mean_here() -> None:
    assert how_it_ended(-signal.SIGTERM) == "by SIGTERM"
    assert "a file that was mapped" in how_it_ended(-signal.SIGBUS)
    assert how_it_ended(-64) in ("by signal 64", "by SIGRTMAX")
    assert how_it_ended(7) == "with exit code 7"


def test_a_process_that_lives_is_no_zombie() -> None:
    assert how_a_zombie_ended(Path("/proc/self/stat").read_text()) is None
