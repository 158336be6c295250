"""Twenty-four clients that ask, err, cancel, dawdle and go away: each is answered as when alone."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.faults.load import NUM_CLIENTS, Load
from tests.faults.questions import answers_alone, make_questions
from tests.faults.triton_door import TritonDoor
from tests.support.triton_server import Served


def test_a_load_of_all_kinds_is_answered_as_alone_and_nothing_is_lost(
    triton_server: Served, float32_engine_dir: Path
) -> None:
    seed = random.randrange(1 << 32)
    questions = make_questions()
    door = TritonDoor(triton_server, questions, answers_alone(float32_engine_dir, questions))
    load = Load(door, seed).start()
    load.wait_for(15 * NUM_CLIENTS)
    tally = load.stop()
    assert tally.wrong == [], f"seed {seed}"
    assert set(tally.done) == set(door.deeds), f"seed {seed}: {tally.done}"
    triton_server.wait_for_sample("nvlm_requests_running", 0, timeout_s=60)
    triton_server.wait_for_sample("nvlm_requests_waiting", 0, timeout_s=60)
    assert triton_server.samples().get('nvlm_requests_total{outcome="failed"}', 0) == 0


class _Broken:
    """A door whose answers are wrong now and then."""

    def __init__(self) -> None:
        self._lock, self._number = threading.Lock(), 0
        self.deeds = {"valid": self._answer}

    def _answer(self, _: random.Random) -> str | None:
        with self._lock:
            self._number += 1
            return "not as alone" if self._number == 100 else None


def test_a_single_wrong_answer_of_hundreds_is_reported() -> None:
    load = Load(_Broken(), 0).start()
    load.wait_for(200)
    assert load.stop().wrong == ["valid: not as alone"]


def test_a_client_that_meets_what_nobody_expects_ends_the_load() -> None:
    class Raising:
        def __init__(self) -> None:
            self.deeds = {"valid": self._raise}

        def _raise(self, _: random.Random) -> None:
            raise ZeroDivisionError

    load = Load(Raising(), 0).start()
    load.wait(60)
    with pytest.raises(ZeroDivisionError):
        load.stop()
