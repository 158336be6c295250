"""A batch through the loop: who works in which thread, and how far ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.decoder.executor import StepOutput
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving import runner as runner_module
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket

Images = Callable[[str], Path]


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Runner:
    return Runner.open(float32_engine_dir, torch.device("cpu"))


class Watched:
    """Which threads did what, and how many requests were open at most."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: dict[str, set[threading.Thread]] = {"prepare": set(), "encode": set()}
        self.threads["step"] = set()
        self.num_prepared = self.num_answered = self.most_open = 0
        lock = threading.Lock()
        prepare, encode, step = runner.prepare, runner.encode, runner.decoder.step

        def watched_prepare(ticket: Ticket) -> None:
            self.threads["prepare"].add(threading.current_thread())
            with lock:
                self.num_prepared += 1
                self.most_open = max(self.most_open, self.num_prepared - self.num_answered)
            prepare(ticket)

        def watched_encode(ticket: Ticket) -> None:
            self.threads["encode"].add(threading.current_thread())
            encode(ticket)

        def watched_step() -> list[StepOutput]:
            self.threads["step"].add(threading.current_thread())
            return step()

        monkeypatch.setattr(runner, "prepare", watched_prepare)
        monkeypatch.setattr(runner, "encode", watched_encode)
        monkeypatch.setattr(runner.decoder, "step", watched_step)


def answer_all(runner: Runner, watched: Watched, requests: list[GenerationRequest]) -> set[int]:
    found = set()
    for index, result in runner.generate_batch(requests):
        assert isinstance(result, GenerationResult)
        watched.num_answered += 1
        found.add(index)
    return found


def pictures(images: Images, number: int) -> list[GenerationRequest]:
    path = images("pixel_1x1.png")
    return [
        GenerationRequest.images_first(f"Question {i}?", (path,), max_new_tokens=1 + i % 3)
        for i in range(number)
    ]


def test_pictures_are_prepared_and_encoded_beside_the_steps_and_a_bounded_number_ahead(
    runner: Runner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "NUM_AHEAD", 2)
    monkeypatch.setattr(runner_module, "MAX_PREPARING_THREADS", 1)
    watched = Watched(runner, monkeypatch)
    assert answer_all(runner, watched, pictures(images, 60)) == set(range(60))
    asking = threading.current_thread()
    assert watched.threads["step"] == {asking}, "no token is handed from thread to thread"
    assert asking not in watched.threads["prepare"] | watched.threads["encode"]
    assert len(watched.threads["encode"]) == 1, "one thread at a time encodes"
    limit = runner.engine.limits.max_batch_size + 2 + 1
    assert watched.most_open <= limit
    assert watched.most_open > runner.engine.limits.max_batch_size, "nothing was ahead"


def test_a_batch_without_pictures_starts_no_thread(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(runner, monkeypatch)
    requests = [GenerationRequest((f"{i}?",), max_new_tokens=2) for i in range(20)]
    assert answer_all(runner, watched, requests) == set(range(20))
    assert set.union(*watched.threads.values()) == {threading.current_thread()}


def test_in_order_the_decoder_gets_requests_as_they_stand(
    runner: Runner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text would overtake pictures otherwise."""
    submitted: list[int] = []
    start = runner.start

    def watched_start(ticket: Ticket) -> int:
        submitted.append(ticket.request.max_new_tokens)
        return start(ticket)

    monkeypatch.setattr(runner, "start", watched_start)
    path = images("landscape_800x450.png")
    requests = [
        GenerationRequest.images_first("x", (path,) * (i % 2), max_new_tokens=1 + i)
        for i in range(12)
    ]
    assert len(list(runner.generate_batch(requests, in_order=True))) == 12
    assert submitted == list(range(1, 13))


def test_a_batch_that_is_left_ends_its_threads_and_what_waits(
    runner: Runner, images: Images
) -> None:
    before = set(threading.enumerate())
    batch = runner.generate_batch(pictures(images, 40))
    next(batch)
    batch.close()
    assert set(threading.enumerate()) == before
    assert runner.decoder.step() == []


def test_a_mistake_of_ours_in_a_preparing_thread_ends_the_batch_as_itself(
    runner: Runner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ticket: Ticket) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runner, "prepare", broken)
    with pytest.raises(ZeroDivisionError):
        list(runner.generate_batch(pictures(images, 3)))
