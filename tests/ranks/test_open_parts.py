"""What a worker says of a machine that cannot run its engine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderOptions
from runtime.engine.engine_dir import EngineDir
from runtime.ranks import open_parts
from runtime.ranks.open_parts import work


class FirstStep:
    """A group whose first step needs the machine's C compiler."""

    def __init__(self, *_: object) -> None:
        pass

    def follow(self) -> None:
        raise subprocess.CalledProcessError(1, ["gcc"])


class Worker:
    """The job of a rank that is not the first."""

    rank = 1

    @property
    def world(self) -> Worker:
        return self

    def phase(self, _name: str) -> None:
        pass


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DecoderOptions(num_answers=1), UserError),  # no step was tried at load
        (DecoderOptions(), subprocess.CalledProcessError),
    ],
)
def test_a_missing_compiler_is_one_line_where_the_first_step_finds_it(
    engine_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: DecoderOptions,
    expected: type[Exception],
) -> None:
    monkeypatch.setattr(open_parts, "ProcessGroup", FirstStep)
    monkeypatch.setattr(open_parts, "open_parts_of_group", lambda *_: None)
    job: Any = Worker()
    with pytest.raises(expected):
        work(EngineDir.read(engine_dir), torch.device("cpu"), job, options)
