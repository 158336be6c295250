"""The benchmark of run.py's start: this checkout beside itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.serving import start
from runtime.engine.engine_dir import EngineDir
from tests.support.command import ROOT


@pytest.mark.process
def test_starts_of_both_checkouts_are_measured_in_turns(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(start, "engine_in", lambda _: EngineDir.read(engine_dir))
    flags = ("--folder", "x", "--device", "cpu", "--repeats", "1", "--before", str(ROOT))
    monkeypatch.setattr("sys.argv", ["start", *flags])
    start.main()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["same_answers"]
    for name in ("before", "after"):
        assert all(seconds > 0 for seconds in found["median_s"][name].values())
    for spent in found["spent_s"].values():
        assert {"importing torch", "decoder weights", "the first token"} <= set(spent)
        assert spent["the first token"] < spent["everything to the first token"]
