"""Programs killed at random moments: the same command resumes to the same bytes and answers."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands.test_kill import Making
from tests.commands.test_kill import calibration as calibration
from tests.commands.test_kill import making as making
from tests.faults.killable import (
    Killable,
    KillableBatch,
    KillableMaking,
    KillableTask,
    await_end,
    kill_at_random,
    segments_of,
)
from tests.frontends.test_triton_dead_parts import serving
from tests.support.command import BUILD, CONVERT

NAMES = (CONVERT, BUILD, "batch", "task")
NUM_KILLS = 2
MANY_KILLS = {CONVERT: 60, BUILD: 60, "batch": 40, "task": 20, "serve": 20}
assert sum(MANY_KILLS.values()) == 200


@pytest.fixture
def killable(
    making: Callable[..., Making], float32_engine_dir: Path, tmp_path: Path
) -> Callable[[str], Killable]:
    def make(name: str) -> Killable:
        if name == "batch":
            return KillableBatch(float32_engine_dir, tmp_path)
        if name == "task":
            return KillableTask(float32_engine_dir, tmp_path)
        return KillableMaking(making(name, tmp_path / "out"))

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_few_kills(killable: Callable[[str], Killable], name: str) -> None:
    kill(killable(name), name, NUM_KILLS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_many_kills(killable: Callable[[str], Killable], name: str) -> None:
    kill(killable(name), name, MANY_KILLS[name])


def kill(killable: Killable, name: str, num_kills: int) -> None:
    num_killed = kill_at_random(killable, num_kills, random.randrange(1 << 32))
    print(f"{name}: {num_killed} of {num_kills} runs were killed before their end")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_kills_of_a_server(float32_engine_dir: Path, tmp_path: Path) -> None:
    """The program, tritonserver and the model's process die in turn; each next one serves."""
    choice = random.Random(random.randrange(1 << 32))
    answers = set()
    for number in range(MANY_KILLS["serve"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with serving(float32_engine_dir, folder) as server:
            answer = server.served.generate(text_input="Well?", max_tokens=9)
            answers.add(answer["text_output"])
            group = server.tritonserver
            victims = (server.process.pid, group, server.model_process)
            os.kill(choice.choice(victims), signal.SIGKILL)
            assert server.process.wait(150) in (3, -signal.SIGKILL), server.log.read_text()
            await_end(group)
            assert segments_of(server.process.pid) == []
    assert len(answers) == 1
