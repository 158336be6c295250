"""A thread of a server that dies or hangs: seen, reported once, and nobody waits in vain."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nvlm.program.errors import PartDiedError, UserError
from runtime.decoder.executor import StepOutput
from runtime.requests.types import Answer, GenerationRequest
from runtime.serving.part import Part
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.watch import Watch

WAIT_S = 60
LOOK_S, HANG_S = 0.01, 2.0


@pytest.fixture
def runner(float32_engine_dir: Path) -> Runner:
    return Runner.open(float32_engine_dir, torch.device("cpu"))


class OnEnd:
    """What `on_end` hears."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Exception] = queue.Queue()

    def __call__(self, error: Exception) -> None:
        self._queue.put(error)

    def wait(self) -> Exception:
        return self._queue.get(timeout=WAIT_S)

    @property
    def is_silent(self) -> bool:
        return self._queue.empty()


class Ends:
    """Waits for the last piece of each of several answers."""

    def __init__(self, server: Server, *texts: str) -> None:
        self._queue: queue.Queue[Answer] = queue.Queue()
        for text in texts:
            server.submit(GenerationRequest.of(text, max_new_tokens=500), self._hear)
        self._number = len(texts)

    def _hear(self, answer: Answer) -> None:
        if answer.is_last:
            self._queue.put(answer)

    def errors(self) -> list[Exception | None]:
        return [self._queue.get(timeout=WAIT_S).error for _ in range(self._number)]


def part(thread: threading.Thread | None = None) -> Part:
    made = Part("the part")
    made.thread = thread
    return made


def watching(*parts: Part, limit_s: float | None = None) -> Watch:
    return Watch(parts, lambda error: None, hang_after_s=limit_s)


def test_a_part_that_makes_progress_or_rests_never_hangs() -> None:
    """However long, by its limit of three looks."""
    working, resting = part(), part()
    watch = watching(working, resting)
    resting.begin(3.0)
    resting.rest()
    for _ in range(20):
        working.begin(3.0)
        assert watch.look() is None
        assert watch.look() is None


def test_a_part_without_progress_hangs_by_its_own_limit_or_the_given_one() -> None:
    for limit_s, num_looks in ((None, 7), (2.0, 2)):
        hanging = part()
        hanging.begin(7.0)
        watch = watching(hanging, limit_s=limit_s)
        assert [watch.look() for _ in range(num_looks)] == [None] * num_looks
        with pytest.raises(PartDiedError, match=f"the part has made no progress for {num_looks} s"):
            raise watch.look() or AssertionError("not seen")


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_jumps_makes_nothing_hang(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Looks are counted: a machine that slept for a day has not worked either."""
    import time

    working = part()
    working.begin(60.0)
    watch = watching(working)
    for name in ("time", "monotonic", "perf_counter"):
        clock = getattr(time, name)
        monkeypatch.setattr(time, name, lambda clock=clock: clock() + jump_s)
        assert watch.look() is None


def test_a_thread_that_ended_is_reported_with_what_ended_it() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    dead = part(thread)
    dead.error = ValueError("the test's failure")
    error = watching(dead).look()
    assert isinstance(error, PartDiedError)
    assert str(error) == "the part has ended: ValueError: the test's failure"


@pytest.fixture
def let_go() -> Iterator[threading.Event]:
    """So that no thread of a test outlives it for long."""
    event = threading.Event()
    yield event
    event.set()


def serve(runner: Runner, on_end: OnEnd, hang_after_s: float | None = None) -> Server:
    return Server(runner, on_end=on_end, hang_after_s=hang_after_s, look_s=LOOK_S)


@pytest.mark.parametrize("failure", [RuntimeError("the test's"), SystemExit(3)])
def test_with_the_decoders_thread_dead_all_are_answered_and_the_server_says_why(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """Also of what is no `Exception`, which nothing in a thread expects."""
    may_fail = threading.Event()

    def fail() -> list[StepOutput]:
        may_fail.wait(WAIT_S)
        raise failure

    def probe() -> None:
        raise failure

    monkeypatch.setattr(runner.decoder, "step", fail)
    monkeypatch.setattr(runner, "probe", probe)
    on_end = OnEnd()
    server = serve(runner, on_end)
    ends = Ends(server, *"abcdefghijkl")
    may_fail.set()
    for heard in ends.errors():
        assert heard is failure or "the decoder's thread has ended" in str(heard)
    error = on_end.wait()
    assert isinstance(error, PartDiedError)
    assert "the decoder's thread has ended" in str(error)
    assert server.failure is error
    assert server.has_failed
    with pytest.raises(RuntimeError, match="the decoder has failed"):
        Ends(server, "later")
    server.close()
    assert on_end.is_silent, "called once"


def test_a_decoder_that_hangs_is_reported_and_nobody_waits_for_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, let_go: threading.Event
) -> None:
    def hang() -> list[StepOutput]:
        let_go.wait(WAIT_S)
        return []

    monkeypatch.setattr(runner.decoder, "step", hang)
    on_end = OnEnd()
    server = serve(runner, on_end, hang_after_s=HANG_S)
    errors = Ends(server, "a", "b").errors()
    assert all(isinstance(error, PartDiedError) for error in errors)
    assert "the decoder's thread has made no progress" in str(on_end.wait())
    server.close()  # returns


@pytest.mark.parametrize("stage", ["prepare", "encode"])
@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
def test_so_are_the_threads_that_prepare(
    runner: Runner,
    monkeypatch: pytest.MonkeyPatch,
    let_go: threading.Event,
    stage: str,
    dies: bool,
) -> None:
    def fail(_: object) -> None:
        if dies:
            raise SystemExit
        let_go.wait(WAIT_S)

    monkeypatch.setattr(runner, stage, fail)
    on_end = OnEnd()
    server = serve(runner, on_end, hang_after_s=HANG_S)
    (error,) = Ends(server, "a").errors()
    assert isinstance(error, PartDiedError)
    assert "the thread that prepares texts has" in str(on_end.wait())
    server.close()


def test_a_step_that_fails_is_its_requests_alone_if_the_next_one_works(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failures = runner.decoder.step, [RuntimeError("the test's failure")]

    def fails_once() -> list[StepOutput]:
        if failures:
            raise failures.pop()
        return step()

    monkeypatch.setattr(runner.decoder, "step", fails_once)
    on_end = OnEnd()
    server = serve(runner, on_end)
    (error,) = Ends(server, "a").errors()
    assert str(error) == "the test's failure"
    assert Ends(server, "b").errors() == [None]
    assert on_end.is_silent
    server.close()


def test_a_decoder_that_fails_every_step_ends_the_server(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU that fell off its bus does: health must not stay good."""

    def fail() -> list[StepOutput]:
        raise RuntimeError("the test's failure")

    monkeypatch.setattr(runner.decoder, "step", fail)
    on_end = OnEnd()
    server = serve(runner, on_end)
    (error,) = Ends(server, "a").errors()
    assert error is not None
    assert "the decoder's thread has ended: RuntimeError" in str(on_end.wait())
    server.close()


def test_a_server_that_rests_takes_a_step_for_nobody_and_none_while_it_works(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed, num_open_at_probes = threading.Event(), []
    probe = runner.probe

    def note() -> None:
        probe()
        num_open_at_probes.append(server.num_open)
        probed.set()

    monkeypatch.setattr(runner, "probe", note)
    on_end = OnEnd()
    server = serve(runner, on_end)
    assert Ends(server, "a").errors() == [None]
    assert probed.wait(WAIT_S)
    assert Ends(server, "b").errors() == [None], "a probe leaves nothing"
    assert set(num_open_at_probes) == {0}
    assert on_end.is_silent
    server.close()


def test_what_breaks_in_such_a_step_ends_the_server(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[StepOutput]:
        raise RuntimeError("the GPU has fallen off the bus")

    monkeypatch.setattr(runner.decoder, "step", fail)
    on_end = OnEnd()
    server = serve(runner, on_end)
    assert "fallen off" in str(on_end.wait())
    server.close()


def test_an_engine_that_is_changed_ends_the_server_as_the_users_mistake(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nobody asks, too."""

    def changed() -> None:
        raise UserError("the engine was changed")

    monkeypatch.setattr(runner.mapped, "require_unchanged", changed)
    on_end = OnEnd()
    server = serve(runner, on_end)
    error = on_end.wait()
    assert isinstance(error, UserError)
    server.close()
