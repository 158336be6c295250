"""The server loop without Triton: shared steps, order, cancellation, bounds, failures, threads."""

from __future__ import annotations

import queue
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm.inputs.images import load_image
from nvlm.program.errors import PartDiedError, UserError
from runtime.decoder.executor import DecoderRequest, StepOutput
from runtime.decoder.torch_executor import TorchDecoderExecutor
from runtime.requests.types import Answer, GenerationRequest, GenerationResult
from runtime.serving.encoded_pictures import EncodedPictures
from runtime.serving.loop import BusyError
from runtime.serving.metrics import WAIT_CAUSES
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from runtime.serving.ticket import Ticket
from tests.commands.test_bad_input_image import one_bit_png
from tests.support.asking import Images
from tests.support.waiting import eventually

WAIT_S = 30


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Runner:
    return Runner.open(float32_engine_dir, torch.device("cpu"))


@pytest.fixture(autouse=True)
def pictures_are_new(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test encodes its own."""
    monkeypatch.setattr(runner, "_encoded", EncodedPictures())


@pytest.fixture
def server(runner: Runner) -> Iterator[Server]:
    server = Server(runner)
    yield server
    server.close()
    assert scheduler_is_empty(runner)


def scheduler_is_empty(runner: Runner) -> bool:
    decoder = runner.decoder
    assert isinstance(decoder, TorchDecoderExecutor)
    return decoder.scheduler.num_running == decoder.scheduler.num_waiting == 0


class Listener:
    """Collects answers until the last."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Answer] = queue.Queue()
        self.pieces: list[str] = []
        self.began_at = self.ended_at = 0.0

    def __call__(self, answer: Answer) -> None:
        self.began_at = self.began_at or time.perf_counter()
        self._queue.put(answer)

    def first(self) -> Answer:
        return self._queue.get(timeout=WAIT_S)

    def result(self) -> GenerationResult:
        """Waits for the end; raises what it ended with."""
        while True:
            answer = self.first()
            if answer.error is not None:
                raise answer.error
            self.pieces.append(answer.text)
            if answer.result is not None:
                self.ended_at = time.perf_counter()
                return answer.result

    @property
    def is_silent(self) -> bool:
        return self._queue.empty()


def question(text: str, num_tokens: int, *paths: Path) -> GenerationRequest:
    return GenerationRequest.images_first(text, paths, max_new_tokens=num_tokens)


def answered(server: Server, request: GenerationRequest) -> GenerationResult:
    listener = Listener()
    server.submit(request, listener)
    return listener.result()


def test_concurrent_requests_get_the_answers_they_get_alone(runner: Runner, images: Images) -> None:
    names = ("landscape_800x450.png", "portrait_400x1000.png", "pixel_1x1.png")
    paths = [images(name) for name in names]
    requests = [question(f"Question {i}?", 3 + 2 * i, *paths[: i % 4]) for i in range(12)]
    expected = [replace(runner.generate(request)) for request in requests]
    server = Server(runner)
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda request: answered(server, request), requests * 2))
    samples = server.samples()
    server.close()
    for index, result in enumerate(found):
        assert replace(result, timings=expected[index % 12].timings) == expected[index % 12]
    total, count = (samples[f"nvlm_decode_batch_size_{end}", ()] for end in ("sum", "count"))
    assert total / count > 2
    assert samples["nvlm_step_seconds_count", ()] == count
    computed = [
        samples["nvlm_computed_prompt_tokens_total", (("beside", each),)] for each in ("yes", "no")
    ]
    assert all(computed)
    assert sum(computed) <= samples["nvlm_prompt_tokens_total", ()]
    assert samples["nvlm_vision_seconds_total", ()] > 0
    assert {
        dict(labels)["cause"]: value
        for (name, labels), value in samples.items()
        if name == "nvlm_requests_waiting_by_cause"
    } == dict.fromkeys(WAIT_CAUSES, 0)


def test_a_later_short_request_ends_before_an_earlier_long_one(server: Server) -> None:
    long, short = Listener(), Listener()
    server.submit(question("Long?", 200), long)
    long.first()
    server.submit(question("Short?", 3), short)
    short.result()
    long.result()
    assert short.ended_at < long.ended_at


def test_the_smallest_priority_is_next_and_what_runs_continues(
    server: Server, runner: Runner
) -> None:
    running = [Listener() for _ in range(runner.engine.limits.max_batch_size)]
    for listener in running:
        server.submit(question("Long?", 60), listener)
    for listener in running:
        listener.first()
    waiting = {priority: Listener() for priority in (5, 0, 7, -3)}
    for priority, listener in waiting.items():
        server.submit(replace(question("Short?", 40), priority=priority), listener)
    for listener in (*running, *waiting.values()):
        listener.result()
    begun = {priority: listener.began_at for priority, listener in waiting.items()}
    assert sorted(begun, key=begun.__getitem__) == [-3, 0, 5, 7]


@pytest.mark.parametrize("priorities", [(3, 1, 2), (0, 0, 0)])
def test_the_smallest_priority_is_prepared_next(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, priorities: tuple[int, ...]
) -> None:
    prepare, release, order = runner.prepare, threading.Event(), []

    def slow(ticket: Ticket) -> None:
        order.append(ticket)
        assert release.wait(WAIT_S)
        prepare(ticket)

    monkeypatch.setattr(runner, "prepare", slow)
    server = Server(runner)
    listeners = [Listener() for _ in range(4)]
    first = server.submit(question("First?", 1), listeners[0])
    assert eventually(lambda: len(order) == 1)
    asked = [replace(question("Next?", 1), priority=each) for each in priorities]
    tickets = list(map(server.submit, asked, listeners[1:]))
    release.set()
    for listener in listeners:
        listener.result()
    server.close()
    assert order == [first, *sorted(tickets, key=lambda each: each.request.priority)]


def test_a_priority_is_a_whole_number() -> None:
    with pytest.raises(UserError, match="priority is 'high', expected a whole number"):
        GenerationRequest.images_first("What?", priority="high")


def test_encoding_an_image_does_not_stop_the_tokens_of_others(
    runner: Runner, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, inside, release = runner.vision.encode, threading.Event(), threading.Event()

    def slow(tiles: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert release.wait(WAIT_S)
        return encode(tiles)

    monkeypatch.setattr(runner.vision, "encode", slow)
    server = Server(runner)
    picture, text = Listener(), Listener()
    server.submit(question("What?", 4, images("pixel_1x1.png")), picture)
    assert inside.wait(WAIT_S)
    server.submit(question("Meanwhile?", 30), text)
    assert text.result().num_tokens == 30, "text waited for a picture"
    assert picture.is_silent
    release.set()
    picture.result()
    server.close()


def test_a_cancelled_request_is_silent_and_its_place_free(server: Server, runner: Runner) -> None:
    listeners = [Listener() for _ in range(8)]
    tickets = [server.submit(question("Long?", 2000), listener) for listener in listeners]
    listeners[0].first()
    for ticket in tickets:
        server.cancel(ticket)
    assert eventually(lambda: server.num_open == 0)
    assert eventually(lambda: scheduler_is_empty(runner))
    for listener in listeners:
        while not listener.is_silent:
            assert listener.first().result is None
    assert answered(server, question("Still there?", 3)).num_tokens == 3
    assert server.samples()["nvlm_requests_total", (("outcome", "cancelled"),)] == 8


@pytest.mark.parametrize("stage", ["waiting for a place", "waiting for preparation"])
def test_a_request_cancelled_before_it_runs_frees_its_place(
    runner: Runner, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stage == "waiting for preparation":
        prepare = runner.prepare

        def slow(*arguments: object) -> object:
            time.sleep(0.05)
            return prepare(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(runner, "prepare", slow)
    server = Server(runner)
    running = [Listener() for _ in range(8)]
    for listener in running:
        server.submit(question("Long?", 60), listener)
    waiting = [server.submit(question("Later?", 2000), Listener()) for _ in range(20)]
    for ticket in waiting:
        server.cancel(ticket)
    for listener in running:
        assert listener.result().num_tokens == 60
    assert eventually(lambda: server.num_open == 0)
    server.close()


def test_a_full_server_is_busy_and_takes_requests_again(runner: Runner) -> None:
    server = Server(runner, max_queue_size=2)
    listeners = [Listener() for _ in range(10)]
    for listener in listeners:
        server.submit(question("Long?", 40), listener)
    with pytest.raises(BusyError, match="busy with 10 requests; try again later"):
        server.submit(question("One more?", 3), Listener())
    for listener in listeners:
        listener.result()
    assert answered(server, question("Now?", 3)).num_tokens == 3
    server.close()


def test_a_ticket_may_be_printed_at_any_time(server: Server, runner: Runner) -> None:
    listener = Listener()
    ticket = server.submit(question("What?", 3), listener)
    assert "prompt_ids" not in repr(ticket)
    listener.result()
    assert len(repr(ticket)) < 2000
    assert "prompt_ids" not in repr(Ticket(question("What?", 3)))


@pytest.mark.parametrize("request_", ["What?", 5, None])
def test_what_is_no_request_is_refused(server: Server, request_: Any) -> None:
    with pytest.raises(UserError, match=r"is of type \w+, expected a GenerationRequest"):
        server.submit(request_, Listener())


def test_a_bad_request_ends_alone(server: Server, images: Images) -> None:
    good, bad, late = Listener(), Listener(), Listener()
    server.submit(question("Long?", 60), good)
    server.submit(GenerationRequest((b"\x89PNG\r\n\x1a\nno picture", "What?")), bad)
    server.submit(question("x " * 5000, 3), late)
    with pytest.raises(UserError, match="not a whole image"):
        bad.result()
    with pytest.raises(UserError, match="shorten"):
        late.result()
    assert good.result().num_tokens == 60
    assert server.samples()["nvlm_requests_total", (("outcome", "refused"),)] == 2


def test_a_step_that_fails_is_reported_to_all_in_it_and_the_server_continues(
    server: Server, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[StepOutput]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner.decoder, "step", broken)
        listeners = [Listener() for _ in range(3)]
        for listener in listeners:
            server.submit(question("What?", 3), listener)
        for listener in listeners:
            with pytest.raises(RuntimeError, match="out of memory"):
                listener.result()
    assert answered(server, question("And now?", 3)).num_tokens == 3


def test_an_error_of_one_request_in_a_step_ends_it_alone(
    server: Server, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, step, doomed = runner.decoder.submit, runner.decoder.step, set[int]()

    def marked(request: DecoderRequest) -> int:
        request_id = submit(request)
        if request.max_new_tokens == 13:
            doomed.add(request_id)
        return request_id

    def some_fail() -> list[StepOutput]:
        return [
            StepOutput(o.request_id, None, None, error=RuntimeError("lost"))
            if o.request_id in doomed
            else o
            for o in step()
        ]

    monkeypatch.setattr(runner.decoder, "submit", marked)
    monkeypatch.setattr(runner.decoder, "step", some_fail)
    good, bad = Listener(), Listener()
    server.submit(question("Good?", 20), good)
    server.submit(question("Bad?", 13), bad)
    with pytest.raises(RuntimeError, match="lost"):
        bad.result()
    assert good.result().num_tokens == 20


def test_a_listener_that_fails_ends_its_own_request_only(server: Server) -> None:
    def broken(_: Answer) -> None:
        raise ValueError("nobody listens")

    good = Listener()
    server.submit(question("Bad?", 500), broken)
    server.submit(question("Good?", 20), good)
    assert good.result().num_tokens == 20
    assert eventually(lambda: server.num_open == 0)


def test_pieces_never_split_a_character(
    server: Server, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder is made to say a text whose characters are two to four tokens each."""
    text = "Grüße, 日本語 🙂 und é!"
    ids = [token for byte in text.encode() for token in byte_token(runner, byte)]
    step, said = runner.decoder.step, iter(ids)

    def saying() -> list[StepOutput]:
        return [replace(o, token_id=next(said), finish_reason=reason(o)) for o in step()]

    def reason(output: StepOutput) -> None:
        assert output.finish_reason in (None, "length")
        return output.finish_reason  # type: ignore[return-value]

    monkeypatch.setattr(runner.decoder, "step", saying)
    listener = Listener()
    request = replace(question("Say it.", len(ids)), stop=())
    server.submit(request, listener)
    assert listener.result().text == text
    assert "".join(listener.pieces) == text
    assert len(listener.pieces) == len(text), "every character is a piece of its own"


def byte_token(runner: Runner, byte: int) -> list[int]:
    tokenizer = runner.tokenizer
    return [next(i for i in range(tokenizer.num_tokens) if tokenizer.bytes_of(i) == bytes([byte]))]


def test_closing_refuses_what_is_open(runner: Runner) -> None:
    server = Server(runner)
    listener = Listener()
    server.submit(question("Long?", 2000), listener)
    server.close()
    with pytest.raises(BusyError, match="stopping"):
        listener.result()
    with pytest.raises(BusyError):
        server.submit(question("x", 1), Listener())
    assert scheduler_is_empty(runner)


def test_many_threads_load_images_and_every_limit_holds(images: Images) -> None:
    """Good pictures, a bomb and a picture Pillow remarks on, at once; the process's warning filters
    stay as they were."""
    good = images("landscape_800x450.png").read_bytes()
    remark = images("palette_alpha.png").read_bytes()
    bomb = one_bit_png(30000, 30000, b"")
    filters = list(warnings.filters)
    pixels = load_image(good).tobytes()

    def load(number: int) -> bool:
        if number % 3 == 0:
            with pytest.raises(UserError, match="more than 178,956,970 pixels"):
                load_image(bomb)
            return True
        if number % 3 == 1:
            return load_image(remark).mode == "RGB"
        return load_image(good).tobytes() == pixels

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(load, range(150)))
    assert list(warnings.filters) == filters


def test_a_decoder_that_ends_leaves_nobody_waiting(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an error of a step, which fails that step's requests, but one of the loop itself."""
    server, listener = Server(runner), Listener()
    monkeypatch.setattr(server._loop, "_step", lambda: 1 / 0)
    request = GenerationRequest.images_first("Hello?", ())
    server.submit(request, listener)
    error = listener.first().error
    assert isinstance(error, PartDiedError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="the decoder has failed"):  # not busy: for ever
        server.submit(request, listener)
    server.close()
    assert scheduler_is_empty(runner)
