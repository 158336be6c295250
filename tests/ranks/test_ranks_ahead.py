"""Running ahead on ranks under a real `mpirun`, on the CPU: the tokens of not running ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import FP8, Workshop
from tests.support.ranks import ROOT, command, engine_of, finished, needs_mpi

AHEAD = ROOT / "tests" / "support" / "rank_ahead.py"

pytestmark = [needs_mpi, pytest.mark.mpi]


@pytest.mark.parametrize(
    ("num_ranks", "num_requests"),
    [(2, 50), (4, 12), (8, 4), pytest.param(2, 300, marks=pytest.mark.slow)],
)
def test_random_batches_get_the_tokens_of_not_running_ahead(
    workshop: Workshop, tmp_path: Path, num_ranks: int, num_requests: int
) -> None:
    """Requests join, end by stop tokens, are cancelled while a step is in flight and give way
    where blocks run out; some are sampled, some have a picture."""
    engine = engine_of(workshop, num_ranks, FP8)
    words = command(num_ranks, AHEAD, engine, num_requests, tmp_path)
    result = finished(words, tmp_path, timeout=250)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")
    found = json.loads((tmp_path / "found.json").read_text())
    waiting, ahead = found["waiting"], found["ahead"]
    assert ahead["answers"] == waiting["answers"]
    assert sum(map(len, waiting["answers"])) > 6 * num_requests
    assert waiting["num_steps_ahead"] == 0
    assert ahead["num_steps_ahead"] > ahead["num_steps"] // 4
    assert num_ranks > 2 or ahead["num_preemptions"] > 3
