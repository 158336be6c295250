"""The benchmark of a batch beside another checkout's: this checkout beside itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cpu import batch
from tests.support.command import ROOT


@pytest.mark.process
@pytest.mark.parametrize("step_ms", ["0", "1"], ids=["the engine's decoder", "a double"])
def test_both_checkouts_answer_the_same_photographs(
    step_ms: str,
    engine_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    flags = ("--num_requests", "2", "--repeats", "1", "--max_new_tokens", "4")
    beside = ("--before", str(ROOT), "--step_ms", step_ms)
    monkeypatch.setattr("sys.argv", ["batch", "--engine_dir", str(engine_dir), *flags, *beside])
    batch.main()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["same_answers"]
    assert found["num_requests"] == 2
    assert found["after_by_before"] > 0
