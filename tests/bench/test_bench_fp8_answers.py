"""What FP8 costs is measured beside bfloat16, on the trained model and on random ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.cpu import fp8_answers


@pytest.mark.process
@pytest.mark.slow
def test_fp8_is_compared_with_bfloat16_of_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp8_answers, "RANDOM_QUESTIONS_PER_TASK", 1)
    fp8_answers.main(["--folder", str(tmp_path), "--per_task", "1", "--num_random", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    caches = ["FP8 after, own KV scales", "FP8 after, bfloat16 KV"]
    names = ["bfloat16", "FP8 after", "FP8 after, vision too", *caches]
    for rows in (found["trained"], found["random"]):
        assert [row["name"] for row in rows] == names
        assert rows[0]["mean_logit_error"] == 0
        assert all(0 < row["mean_logit_error"] < 0.4 for row in rows[1:])
    assert all(row["num_questions"] == 8 for row in found["trained"])
    assert found["trained"][1]["num_right"] >= 7


@pytest.mark.process
@pytest.mark.slow
def test_a_head_in_fp8_is_compared_with_one_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fp8_answers, "RANDOM_QUESTIONS_PER_TASK", 1)
    flags = ["--folder", str(tmp_path), "--per_task", "1", "--num_random", "1", "--fp8_head"]
    fp8_answers.main(flags)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for rows in (found["trained"], found["random"]):
        assert [row["name"] for row in rows] == ["bfloat16", "FP8", "FP8 head"]
        assert 0 < rows[1]["mean_logit_error"] != rows[2]["mean_logit_error"] > 0
