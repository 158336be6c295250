"""Many threads ask one runner: every answer is the one given alone, and nobody waits for ever."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvlm.program.errors import UserError
from runtime.decoder.executor import StepOutput
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.loop import Loop
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket
from tests.support.asking import Images
from tests.support.waiting import eventually

WAIT_S = 60
NUM_THREADS = 32


@pytest.fixture(scope="module")
def alone(float32_engine_dir: Path) -> Runner:
    """Is asked by one thread at a time."""
    return Runner.open(float32_engine_dir, torch.device("cpu"))


@pytest.fixture
def runner(alone: Runner) -> Iterator[Runner]:
    """Threads of its own end with it."""
    runner = Runner(alone.engine, alone.vision, alone.decoder)
    yield runner
    runner._loop.close()
    assert alone.decoder.step() == [], "something is still in the decoder"


def picture_questions(folder: Path, number: int, num_pictures: int) -> list[GenerationRequest]:
    """Questions of unequal length about one to three of `num_pictures` pictures; a quarter sample,
    and some ask the same."""
    draw = random.Random(20)
    paths = []
    for index in range(num_pictures):
        size = draw.choice([(64, 64), (90, 40), (40, 90)])
        path = folder / f"{index}.png"
        Image.effect_noise(size, 20 + index).convert("RGB").save(path)
        paths.append(path)
    return [
        GenerationRequest.images_first(
            f"Question {draw.randrange(number)}?" + " Why?" * draw.randrange(4),
            tuple(draw.sample(paths, draw.randint(1, 3))),
            max_num_tiles=draw.choice([1, 2]),
            max_new_tokens=draw.randint(1, 12),
            sampling=SamplingParams(temperature=draw.choice([0.0, 0.0, 0.0, 1.0]), seed=index),
        )
        for index in range(number)
    ]


def ask(runner: Runner, request: GenerationRequest, index: int) -> GenerationResult:
    """In one of the library's three ways."""
    if index % 3 == 0:
        return runner.generate(request)
    if index % 3 == 1:
        *pieces, last = runner.stream(request)
        assert last.result is not None
        assert "".join(piece.text for piece in [*pieces, last]) == last.result.text
        return last.result
    ((_, result),) = runner.generate_batch([request])
    assert isinstance(result, GenerationResult)
    return result


@pytest.mark.parametrize(
    ("number", "num_pictures"), [(96, 8), pytest.param(500, 40, marks=pytest.mark.slow)]
)
def test_32_threads_get_the_answers_that_each_question_gets_alone(
    runner: Runner, alone: Runner, tmp_path: Path, number: int, num_pictures: int
) -> None:
    requests = picture_questions(tmp_path, number, num_pictures)
    expected = [alone.generate(request) for request in requests]
    assert len({tuple(result.token_ids) for result in expected}) > number // 3
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(lambda each: ask(runner, each[1], each[0]), enumerate(requests)))
    for index, result in enumerate(found):
        assert replace(result, timings=expected[index].timings) == expected[index], index


@pytest.mark.slow
def test_32_threads_get_the_same_answers_from_a_server(
    runner: Runner, alone: Runner, tmp_path: Path
) -> None:
    requests = picture_questions(tmp_path, 500, 40)
    expected = [alone.generate(request) for request in requests]
    server = Server(runner)

    def answered(request: GenerationRequest) -> GenerationResult:
        results: list[GenerationResult] = []
        is_over = threading.Event()

        def listen(answer: object) -> None:
            if (result := getattr(answer, "result", None)) is not None:
                results.append(result)
                is_over.set()

        server.submit(request, listen)
        assert is_over.wait(WAIT_S)
        return results[0]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(answered, requests))
    server.close()
    for index, result in enumerate(found):
        assert replace(result, timings=expected[index].timings) == expected[index], index


def text(question: str, num_tokens: int) -> GenerationRequest:
    return GenerationRequest((question,), max_new_tokens=num_tokens)


def watch_steps(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name of the thread, rows) of each step from now on."""
    steps: list[tuple[str, int]] = []
    step = runner.decoder.step

    def watched() -> list[StepOutput]:
        outputs = step()
        steps.append((threading.current_thread().name, len(outputs)))
        return outputs

    monkeypatch.setattr(runner.decoder, "step", watched)
    return steps


def test_threads_share_steps_which_one_thread_takes(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watch_steps(runner, monkeypatch)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: runner.generate(text(f"{i}?", 40)), range(16)))
    own = [rows for name, rows in steps if name.startswith("nvlm-decoder")]
    assert len({name for name, _ in steps}) <= 2, "the first asker, then the runner's own thread"
    assert sum(own) / len(own) > 2
    assert sum(rows for _, rows in steps) == 16 * 40


def test_who_asks_alone_starts_no_thread(runner: Runner) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        runner.generate(text("Alone?", 3))
    assert set(threading.enumerate()) == before


def test_a_stream_that_nobody_reads_stops_nobody(runner: Runner) -> None:
    pieces = runner.stream(text("Read later?", 200))
    first = next(pieces).text
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: runner.generate(text(f"{i}?", 5)), range(40)))
    assert [result.num_tokens for result in results] == [5] * 40
    rest = list(pieces)
    assert rest[-1].result is not None
    assert first + "".join(piece.text for piece in rest) == rest[-1].result.text


def test_more_streams_of_one_thread_than_the_loop_has_places(runner: Runner) -> None:
    streams = [runner.stream(text(f"{i}?", 4 + i % 5)) for i in range(60)]
    firsts = [next(pieces) for pieces in streams]
    for index, (first, pieces) in enumerate(zip(firsts, streams, strict=True)):
        last = [first, *pieces][-1]
        assert last.result is not None
        assert last.result.num_tokens == 4 + index % 5


def test_each_thread_hears_its_own_error(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(index: int) -> str:
        missing = tmp_path / f"{index}.png"
        request = GenerationRequest.images_first("x", (missing,) * (index % 2), max_new_tokens=3)
        try:
            return runner.generate(request).finish_reason
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for index, found in enumerate(pool.map(outcome, range(64))):
            assert f"{index}.png cannot be read" in found if index % 2 else found == "length"


@pytest.mark.parametrize("broken", ["a step", "the loop"])
def test_what_breaks_is_raised_in_every_thread_and_the_next_question_is_answered(
    runner: Runner, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runner.generate(text("And now?", 5)).token_ids
    where, name = (runner.decoder, "step") if broken == "a step" else (Loop, "_step")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda *_: 1 / 0)
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(runner.generate, text(f"{i}?", 5)) for i in range(8)]:
                with pytest.raises((ZeroDivisionError, RuntimeError)):
                    future.result(timeout=WAIT_S)
    assert runner.generate(text("And now?", 5)).token_ids == expected


def test_an_interrupted_step_ends_every_request_in_it_and_the_next_question_is_answered(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C in the thread that takes the steps, while another one waits: a step that is lost
    half way would leave a token out of the other's answer."""
    expected = runner.generate(text("And now?", 5)).token_ids
    step, is_inside, has_joined = runner.decoder.step, threading.Event(), threading.Event()

    def interrupted() -> list[StepOutput]:
        step()
        is_inside.set()
        assert has_joined.wait(WAIT_S)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(runner.decoder, "step", interrupted)
        first = pool.submit(runner.generate, text("First?", 5))
        assert is_inside.wait(WAIT_S)
        second = pool.submit(runner.generate, text("Second?", 5))
        assert eventually(lambda: len(runner._loop._askers) == 2, WAIT_S)
        assert eventually(lambda: runner._loop._is_leading, WAIT_S)
        has_joined.set()
        with pytest.raises(KeyboardInterrupt):
            first.result(timeout=WAIT_S)
        with pytest.raises(RuntimeError, match=r"was interrupted; ask again|decoder has failed"):
            second.result(timeout=WAIT_S)
    assert runner.generate(text("And now?", 5)).token_ids == expected


@pytest.mark.parametrize("stage", ["prepare", "encode"])
def test_an_interrupt_before_the_decoder_leaves_no_place_taken(
    runner: Runner, stage: str, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    request = GenerationRequest.images_first("x", (images("pixel_1x1.png"),), max_new_tokens=3)
    pieces = runner.stream(text("Another?", 30))
    next(pieces)
    with monkeypatch.context() as patch:
        patch.setattr(runner, stage, interrupted)
        for _ in range(40):
            with pytest.raises(KeyboardInterrupt):
                runner.generate(request)
    assert runner.generate(request).num_tokens == 3
    *_, last = pieces
    assert last.result is not None
    assert last.result.num_tokens == 30


def test_a_forgotten_stream_frees_its_place_from_any_thread(runner: Runner) -> None:
    """The garbage collector closes it, in whichever thread it runs."""

    def forget() -> None:
        pieces = runner.stream(text("Long?", 2000))
        next(pieces)
        cycle: list[object] = [pieces]
        cycle.append(cycle)

    for _ in range(20):
        forget()
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: gc.collect(), range(4)):
            pass
    assert runner.generate(text("Now?", 3)).num_tokens == 3
    assert eventually(lambda: runner._loop._loop is None, WAIT_S)


def test_a_batch_that_is_left_while_it_prepares_leaves_nothing_open(
    runner: Runner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its encoding thread must not end before those that prepare for it."""
    prepare, is_inside = runner.prepare, threading.Event()

    def slow(ticket: Ticket) -> None:
        prepare(ticket)
        if ticket.request.num_images:
            is_inside.set()
            time.sleep(0.2)

    monkeypatch.setattr(runner, "prepare", slow)
    pieces = runner.stream(text("Another?", 60))
    next(pieces)
    picture = GenerationRequest.images_first("x", (images("pixel_1x1.png"),), max_new_tokens=1)
    batch = runner.generate_batch([text("First?", 1), picture, picture, picture])
    next(batch)
    assert is_inside.wait(WAIT_S)
    batch.close()
    pieces.close()
    assert runner._loop._loop is None
    assert runner.generate(text("Now?", 3)).num_tokens == 3


def test_closing_ends_what_is_open_and_refuses_what_comes(alone: Runner) -> None:
    runner = Runner(alone.engine, alone.vision, alone.decoder)
    before = set(threading.enumerate())
    pieces = runner.stream(text("Long?", 2000))
    next(pieces)
    with ThreadPoolExecutor(24) as pool:
        futures = [pool.submit(runner.generate, text("Long?", 2000)) for _ in range(24)]
        assert eventually(lambda: len(runner._loop._askers) == 25, WAIT_S)
        runner.close()
        for future in futures:
            with pytest.raises(UserError, match="this runner was closed"):
                future.result(timeout=WAIT_S)
    with pytest.raises(UserError, match="this runner was closed"):
        list(pieces)
    with pytest.raises(UserError, match="this runner is closed; open the engine again"):
        runner.generate(text("x", 1))
    runner.close()
    assert set(threading.enumerate()) == before
    assert alone.decoder.step() == []


_PROGRAM = """
import sys, threading, torch
from pathlib import Path
from runtime.requests.types import GenerationRequest
from runtime.serving.loop import Loop
from runtime.serving.runner import Runner

runner = Runner.open(Path(sys.argv[1]), torch.device("cpu"))
pieces = runner.stream(GenerationRequest(("Long?",), max_new_tokens=500))
next(pieces)
request = GenerationRequest(("Short?",), max_new_tokens=3)
threads = [threading.Thread(target=runner.generate, args=(request,)) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("asked")
"""


@pytest.mark.process
def test_a_program_ends_with_a_stream_open_and_its_runner_not_closed(
    float32_engine_dir: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(float32_engine_dir)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        cwd=Path(__file__).parents[2],
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "asked\n", "")
