"""The benchmark of the first requests: one start of the server, and what is read of its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.serving import ready


@pytest.mark.process
def test_first_and_tenth_of_each_kind_and_what_start_up_was_spent_on(
    float32_engine_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--engine_dir", str(float32_engine_dir), "--device", "cpu", "--repeats", "1")
    monkeypatch.setattr("sys.argv", ["ready", *flags])
    ready.main()
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["after"]
    assert {"importing", "decoder weights", "the rehearsal", "all of it"} <= found["spent_s"].keys()
    assert found["spent_s"]["all of it"] < found["ready_s"] + 0.1  # two clocks
    for kind in ready.questions():
        assert found[kind]["first_ms"] > 0.0
        assert found[kind]["tenth_ms"] > 0.0
