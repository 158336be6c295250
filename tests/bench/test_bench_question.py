"""The benchmark of one question beside another checkout's: this checkout beside itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from bench.cpu import batch
from bench.serving import question
from tests.support.command import ROOT


@pytest.mark.process
def test_one_question_is_asked_of_both_checkouts_in_turns(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--device", "cpu", "--repeats", "1", "--max_new_tokens", "12", "--before", str(ROOT))
    monkeypatch.setattr("sys.argv", ["question", "--engine_dir", str(engine_dir), *flags])
    question.main()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["same_answers"]
    assert 1 < found["num_tokens"] <= 12
    assert all(found[name]["median"] > 0 for name in ("before", "after"))


@pytest.mark.parametrize("program", [question, batch], ids=lambda program: program.__name__)
def test_a_folder_that_is_no_checkout_is_refused_by_name(
    program: ModuleType,
    engine_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--engine_dir", str(engine_dir), "--before", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["bench", *flags])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    assert f"{tmp_path} has no run.py; give the root of a checkout" in capsys.readouterr().err
