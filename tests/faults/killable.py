"""Programs that are killed at any moment: how each starts, and what must be there in the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.commands.test_kill import Making
from tests.evaluation.test_evaluation_killed import answers_of, long_benchmark, start
from tests.frontends.test_triton_start import running_in_group
from tests.support.asking import ask
from tests.support.command import RUN, Background, background
from tests.support.triton_server import START_TIMEOUT_S

NUM_LINES = 60


class Killable(Protocol):
    """`check` raises where what a killed run left looks like more than it is; `is_done` says
    whether everything is there, and raises where it is not what an uninterrupted run makes."""

    def start(self) -> Background: ...

    def check(self) -> None: ...

    def is_done(self) -> bool: ...

    def forget(self) -> None:
        """So that the next run begins anew."""
        ...


@dataclass(frozen=True, slots=True)
class KillableMaking:
    """convert_checkpoint.py or build_engine.py."""

    making: Making

    def start(self) -> Background:
        return self.making.start()

    def check(self) -> None:
        self.making.assert_absent_or_whole()

    def is_done(self) -> bool:
        if not self.making.place.exists():
            return False
        self.making.assert_rerun_fixes()  # whole, with nothing beside it
        return True

    def forget(self) -> None:
        shutil.rmtree(self.making.place, ignore_errors=True)


class KillableBatch:
    """run.py with a file of requests."""

    def __init__(self, engine_dir: Path, folder: Path) -> None:
        self._engine_dir, self._folder = engine_dir, folder
        lines = [{"id": i, "prompt": f"Question {i}?"} for i in range(NUM_LINES)]
        (folder / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._output = folder / "expected"
        result = self.start().wait()
        assert result.exit_code == 0, result.stderr
        self._expected = self._answers()
        self._output = folder / "out"

    def start(self) -> Background:
        files = ("--input_file", self._folder / "in", "--output_file", self._output)
        return background(RUN, *ask(self._engine_dir, *files), log=self._folder / "log")

    def check(self) -> None:
        found = self._answers()
        assert found == self._expected[: len(found)]

    def is_done(self) -> bool:
        return len(self._answers()) == NUM_LINES

    def forget(self) -> None:
        for path in self._folder.glob("out*"):
            path.unlink()

    def _answers(self) -> list[dict[str, Any]]:
        """Whole lines, but for what was measured."""
        if not self._output.exists():
            return []
        lines = self._output.read_bytes().rpartition(b"\n")[0].splitlines()
        return [{**json.loads(line), "timings": None} for line in lines]


class KillableTask:
    """evaluate.py generate, on a benchmark of three pictures."""

    def __init__(self, engine_dir: Path, folder: Path) -> None:
        self._engine_dir, self._folder = engine_dir, folder
        self._made = long_benchmark(folder)
        result = start(engine_dir, self._made, folder / "expected").wait()
        assert result.exit_code == 0, result.stderr
        self._expected = set(self._lines("expected"))

    def start(self) -> Background:
        return start(self._engine_dir, self._made, self._folder / "out")

    def check(self) -> None:
        found = self._lines("out")
        assert len(set(found)) == len(found)
        assert set(found) <= self._expected

    def is_done(self) -> bool:
        return len(self._lines("out")) == len(self._expected)

    def forget(self) -> None:
        for path in self._folder.glob("out-*"):
            path.unlink()

    def _lines(self, name: str) -> list[bytes]:
        path = answers_of(self._folder / name)
        return path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []


def kill_at_random(killable: Killable, num_kills: int, seed: int) -> int:
    """Starts, kills and starts again, each time after a random part of what a whole run takes;
    returns how many runs were really killed. Whatever was done in the end is done right."""
    choice = random.Random(seed)
    whole_s = 0.0
    for _ in range(2):  # of the first, which may start what starts the others, no time is taken
        begun = time.monotonic()
        assert killable.start().wait().exit_code == 0
        whole_s = time.monotonic() - begun
        assert killable.is_done()
        killable.forget()
    num_killed = 0
    for _ in range(num_kills):
        running = killable.start()
        time.sleep(choice.random() * whole_s)
        running.kill(signal.SIGKILL)
        code = running.wait().exit_code
        assert code in (0, -signal.SIGKILL), f"seed {seed}: {code}"
        num_killed += code != 0
        await_end(running.process.pid)
        killable.check()
        if killable.is_done():
            killable.forget()
    assert killable.start().wait().exit_code == 0, f"seed {seed}"
    assert killable.is_done(), f"seed {seed}"
    return num_killed


def await_end(group: int | None) -> None:
    """Waits until every process of a program's own session has ended."""
    assert group is not None
    end = time.monotonic() + START_TIMEOUT_S
    while running_in_group(group):
        assert time.monotonic() < end, running_in_group(group)
        time.sleep(0.02)


def segments_of(pid: int) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(f"nvlm_{pid}_")]
