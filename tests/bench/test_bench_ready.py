"""The benchmark of the first requests: one start of the server, and what is read of its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.serving import ready
from nvlm.program.errors import UserError


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


def test_a_missing_engine_is_one_line_before_a_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["ready", "--engine_dir", str(tmp_path / "none")])
    with pytest.raises(UserError, match=r"none does not exist; give what build_engine\.py"):
        ready.main()
