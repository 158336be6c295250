"""A report says what made its answers, how many were cut, and how its samples were chosen."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from evaluation import packages
from runtime.engine.engine_dir import EngineDir
from tests.support.benchmarks import chart_qa, doc_vqa
from tests.support.command import GENERATE, SCORE, Result, run_command

COMMON = ("--device", "cpu", "--max_new_tokens", 1)


def answered(engine_dir: Path, folder: Path) -> Result:
    made = chart_qa(folder / "data")
    common = ("--engine_dir", engine_dir, *COMMON)
    return run_command(*GENERATE, *common, *made.run_flags, "--output_path", folder / "out")


def test_a_report_names_what_made_its_answers(float32_engine_dir: Path, tmp_path: Path) -> None:
    """One token is too few for any answer: all are cut."""
    assert answered(float32_engine_dir, tmp_path).exit_code == 0
    flags = ("--input_path", tmp_path / "out", "--report_dir", tmp_path / "report")
    scored = run_command(*SCORE, *flags, "--json")
    assert scored.exit_code == 0, scored.stderr
    engine = EngineDir.read(float32_engine_dir)
    facts = json.loads(scored.stdout)["tasks"]["ChartQA"]["made_by"]
    number = len(chart_qa(tmp_path / "again").lines)
    assert facts == {
        "engine": f"{float32_engine_dir.resolve()} ({engine.manifest.digest[:8]})",
        "checkpoint": engine.manifest.source["checkpoint_digest"][:8],
        "date": time.strftime("%Y-%m-%d"),
        "weights": "float32, decoder torch",
        "KV cache": "float32",
        "vision": "torch float32",
        "prompt format": "megatron",
        "tiles of a picture": "6 at most, and a thumbnail",
        "max_new_tokens": "1",
        "cut": f"{number} of {number} answers",
    }
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert all(f"{name} {value}" in text for name, value in facts.items())
    assert "Chosen by a rule" in (tmp_path / "report" / "report.html").read_text()


def test_answers_keep_why_they_ended_and_older_ones_are_resumed(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    """Lines of an earlier version have no finish_reason: nobody knows of them."""
    assert answered(float32_engine_dir, tmp_path).exit_code == 0
    path = tmp_path / "out-ChartQA-dprank=0-partition=0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line.pop("finish_reason") for line in lines} == {"length"}
    path.write_text(json.dumps(lines[0]) + "\n")
    assert answered(float32_engine_dir, tmp_path).exit_code == 0
    assert len(path.read_text().splitlines()) == len(lines)
    scored = run_command(*SCORE, "--input_path", tmp_path / "out", "--json")
    found = json.loads(scored.stdout)["tasks"]["ChartQA"]["made_by"]["cut"]
    rest = len(lines) - 1
    assert found == f"{rest} of {rest} answers, of 1 unknown"


def test_what_is_missing_for_scoring_is_reported_before_answers_are_made(
    float32_engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be scored elsewhere, so they are made all the same."""
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    made = doc_vqa(tmp_path / "data")
    common = ("--engine_dir", float32_engine_dir, *COMMON)
    done = run_command(*GENERATE, *common, *made.run_flags, "--output_path", tmp_path / "out")
    assert done.exit_code == 0
    message = "answers of SPDocVQA cannot be scored here without rapidfuzz"
    assert done.stderr.startswith(message), done.stderr


def test_java_is_looked_for_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert packages.missing(("json", "java", "no_such_package")) == ["java", "no_such_package"]
