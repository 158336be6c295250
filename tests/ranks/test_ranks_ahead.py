"""Running ahead on ranks under a real `mpirun`, on the CPU: the tokens of not running ahead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import FP8, Workshop
from tests.support.ranks import (
    PHOTO,
    PROGRAM,
    ROOT,
    command,
    engine_of,
    finished,
    needs_mpi,
)

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
    assert sum(map(len, waiting["answers"])) > 4 * num_requests
    assert waiting["num_steps_ahead"] == 0
    assert ahead["num_steps_ahead"] > ahead["num_steps"] // 6
    assert ahead["num_prompts_ahead"] > num_requests // 4
    assert num_ranks > 2 or ahead["num_preemptions"] > 3


@pytest.mark.parametrize(
    "flags",
    [("--streaming",), ("--temperature", 0.8, "--seed", 3), ("--max_step_ms", 20)],
    ids=["streamed", "sampled", "bounded"],
)
def test_a_question_captures_graphs_deletes_them_and_ends_without_a_warning(
    workshop: Workshop, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    """On every rank, and while the group is there, whose end waits for them."""
    question = ("--image", PHOTO, "--prompt", "hi", "--max_new_tokens", 12)
    engine = engine_of(workshop, 2, FP8)
    words = command(2, PROGRAM, "ahead:", "--engine_dir", engine, *question, *flags)
    result = finished(words, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    printed = result.stderr  # of two processes, whose lines may run into each other
    assert [printed.count(f"graphs are {what}") for what in ("captured", "deleted")] == [2, 2]
    assert [
        line
        for line in printed.splitlines()
        if "arning" in line or "[W" in line or "[Gloo]" in line
    ] == []
