"""The soak of serve.py: a short one, and that its checks see what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from bench.serving.soak import MAX_QUEUE_SIZE, Client, Findings, Question, check_end, growth, soak
from tests.conftest import FP32, Workshop
from tests.support.command import ROOT
from tests.support.http_server import Served, serving

pytestmark = pytest.mark.process

TRAINED = ROOT / "models" / "nvlm-d-tiny"
FLAGS = ("--access_log", "none", "--max_queue_size", MAX_QUEUE_SIZE)


@pytest.fixture(scope="module")
def engine(workshop: Workshop) -> Path:
    checkpoint = workshop.checkpoint("served_checkpoint", TRAINED, FP32)
    return workshop.engine("served_engine", checkpoint, vision="torch", max_num_images=2)


def test_clients_of_all_kinds_lose_nothing(engine: Path, tmp_path: Path) -> None:
    with serving(engine, tmp_path, *FLAGS) as served:
        figures, findings = soak(served, seconds=6, num_clients=20, num_questions=6, seed=0)
        assert findings.faults == []
        assert min(figures["clients"][each] for each in ("answers", "left", "wrong")) > 0, figures
        assert_faults_are_seen(served)


def assert_faults_are_seen(served: Served) -> None:
    before = served.samples()
    served.ask()
    findings = Findings()
    findings.count("tokens", 10**9)
    check_end(served, before, findings)
    answered, tokens = findings.faults
    assert "1.0 were answered, and the clients have 0" in answered
    assert "tokens were generated" in tokens


def test_growth_is_that_after_the_warm_up() -> None:
    assert growth([1, 1, 100, 100, 100, 100, 110, 110]) == pytest.approx(0.1)


def test_another_answer_than_alone_is_a_fault() -> None:
    findings = Findings()
    client = Client(0, [], findings, seed=0)
    client._compare(Question({}, ["a"]), ["a"], 1)
    assert findings.faults == []
    client._compare(Question({}, ["a"]), ["b"], 1)
    assert "['b'] is not ['a']" in findings.faults[0]
