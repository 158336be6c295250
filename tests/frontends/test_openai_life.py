"""Places and lives: clients that leave, a full queue, loading, draining, a decoder that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.decoder.executor import StepOutput
from runtime.engine.mapped_files import EngineChangedError
from runtime.serving.runner import Runner
from runtime.serving.server import Server
from tests.support.asgi import Client
from tests.support.waiting import eventually

pytest.importorskip("starlette", reason="requirements/serving.txt is not installed")
pytest.importorskip("prometheus_client", reason="requirements/serving.txt is not installed")

from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions

CHAT = "/v1/chat/completions"
WAIT_S = 30


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Iterator[Runner]:
    with Runner.open(float32_engine_dir, torch.device("cpu")) as runner:
        yield runner


class Steps:
    """Holds the decoder before its next step, until `go`."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self._may_go = threading.Event()
        self._may_go.set()
        self.num_steps = 0
        step = runner.decoder.step

        def held() -> list[StepOutput]:
            self._may_go.wait(WAIT_S)
            self.num_steps += 1
            return step()

        monkeypatch.setattr(runner.decoder, "step", held)

    def hold(self) -> None:
        self._may_go.clear()

    def go(self) -> None:
        self._may_go.set()


@pytest.fixture
def steps(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    steps = Steps(runner, monkeypatch)
    yield steps
    steps.go()


@pytest.fixture
def server(runner: Runner, steps: Steps) -> Iterator[Server]:
    server = Server(runner, max_queue_size=2)
    yield server
    steps.go()
    server.close()


@pytest.fixture
def door(server: Server) -> Iterator[Door]:
    door = Door(DoorOptions())
    door.open(server)
    yield door
    door.close()


@pytest.fixture
def client(door: Door) -> Iterator[Client]:
    with Client(application(door)) as client:
        yield client


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_running", [False, True])
def test_a_client_that_leaves_frees_its_place(
    client: Client, server: Server, steps: Steps, stream: bool, is_running: bool
) -> None:
    """Before the next step of the decoder, whether it streams, waits in the batch, or queues."""
    places = server.runner.engine.limits.max_batch_size
    steps.hold()
    others = [client.begin_post(CHAT, chat()) for _ in range(0 if is_running else places)]
    assert eventually(lambda: server.num_open == len(others))
    call = client.begin_post(CHAT, chat(max_tokens=500, stream=stream))
    assert eventually(lambda: server.num_open == len(others) + 1)
    if is_running and stream:
        steps.go()
        assert eventually(lambda: len(call.reply.chunks) > 1)
        steps.hold()
    call.leave()
    call.wait()
    before = steps.num_steps
    steps.go()
    assert eventually(lambda: server.num_open <= len(others))
    assert [other.wait().status for other in others] == [200] * len(others)
    assert eventually(lambda: server.num_open == 0)
    assert server.samples()["nvlm_requests_total", (("outcome", "cancelled"),)] == 1
    if is_running:
        assert steps.num_steps <= before + 2, "it ran on"


def test_a_full_queue_asks_to_come_again(client: Client, server: Server, steps: Steps) -> None:
    most = server.runner.engine.limits.max_batch_size + 2
    steps.hold()
    calls = [client.begin_post(CHAT, chat()) for _ in range(most)]
    assert eventually(lambda: server.num_open == most)
    reply = client.post(CHAT, chat())
    assert (reply.status, reply.error["code"]) == (429, "queue_full")
    assert reply.error["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) >= 1
    steps.go()
    assert {call.wait().status for call in calls} == {200}
    assert client.post(CHAT, chat()).status == 200


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (None, "the server is stopping; ask another"),
        (
            EngineChangedError("/fast/engine/llm/rank0 was changed"),
            "the server's engine was changed",
        ),
    ],
    ids=["a second signal", "an engine that was changed"],
)
def test_what_a_server_cannot_finish_is_asked_elsewhere(
    client: Client, server: Server, steps: Steps, reason: Exception | None, message: str
) -> None:
    """It is no mistake of the client's, and no path of the server's is named."""
    steps.hold()
    call = client.begin_post(CHAT, chat())
    assert eventually(lambda: server.num_open == 1)
    if reason is None:
        threading.Thread(target=server.close).start()
    else:
        server._loop.stop(reason)
    reply = call.wait()
    assert (reply.status, reply.error["code"]) == (503, "not_ready")
    assert reply.error["message"].startswith(message)
    assert int(reply.headers["retry-after"]) >= 1


def test_bodies_in_memory_are_bounded_over_all_open_calls(server: Server, steps: Steps) -> None:
    door = Door(DoorOptions(max_open_bytes=3000))
    door.open(server)
    large = chat(user="x" * 4000)
    with Client(application(door)) as client:
        assert client.post(CHAT, large).status == 200, "nobody else asks"
        steps.hold()
        first = client.begin_post(CHAT, large)
        assert eventually(lambda: server.num_open == 1)
        reply = client.post(CHAT, chat())
        assert (reply.status, reply.error["code"]) == (429, "queue_full")
        steps.go()
        assert first.wait().status == 200
        assert client.post(CHAT, chat()).status == 200
    door.close()


def test_probes_say_when_requests_are_answered(server: Server) -> None:
    door = Door(DoorOptions())
    with Client(application(door)) as client:
        for path in ("/health", "/ping"):
            assert client.get(path).status == 503
        assert client.post(CHAT, chat()).error["code"] == "not_ready"
        assert client.get("/v1/models").status == 503
        assert client.get("/metrics").status == 200
        door.open(server)
        assert client.get("/health").status == 200
        assert client.post(CHAT, chat()).status == 200
        door.drain()
        reply = client.post(CHAT, chat())
        assert (reply.status, reply.error["type"]) == (503, "server_error")
        assert reply.headers["retry-after"]
        assert client.get("/health").status == 503
    door.close()


def test_draining_answers_what_was_accepted(client: Client, door: Door, steps: Steps) -> None:
    steps.hold()
    calls = [client.begin_post(CHAT, chat(stream=stream)) for stream in (False, True)]
    assert eventually(lambda: door.server.num_open == 2)
    door.drain()
    steps.go()
    assert [call.wait().status for call in calls] == [200, 200]
    assert calls[1].reply.events()
    assert door.num_calls == 0


def test_a_step_that_breaks_is_500_without_its_reason(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[StepOutput]:
        raise RuntimeError("the test's secret")

    with monkeypatch.context() as patched:
        patched.setattr(server.runner.decoder, "step", fail)
        reply = client.post(CHAT, chat())
        assert (reply.status, reply.error["type"]) == (500, "server_error")
        assert "secret" not in reply.error["message"]
        assert reply.headers["x-request-id"] in reply.error["message"]
    assert client.post(CHAT, chat()).status == 200


def test_a_stream_that_breaks_says_so_and_does_not_end_as_whole(
    client: Client, server: Server, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = client.begin_post(CHAT, chat(stream=True, max_tokens=500))
    assert eventually(lambda: len(call.reply.chunks) > 2)
    steps.hold()

    def fail() -> list[StepOutput]:
        raise RuntimeError("the test's secret")

    with monkeypatch.context() as patched:
        patched.setattr(server.runner.decoder, "step", fail)
        steps.go()
        body = call.wait().body
    assert call.reply.status == 200
    assert body.rstrip().endswith(b"}")
    assert b'"error"' in body.split(b"\n\n")[-2]
    assert b"[DONE]" not in body
    assert b"secret" not in body


def test_a_decoder_that_failed_is_unhealthy(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the test's failure")

    monkeypatch.setattr("runtime.serving.loop.Loop._drop_cancelled", fail)
    assert client.post(CHAT, chat()).status == 500
    assert server.has_failed
    assert client.get("/health").status == 503
    assert client.post(CHAT, chat()).status == 503


def test_many_clients_get_what_each_gets_alone(client: Client, server: Server) -> None:
    """Some stream, some leave, some ask nonsense; the metrics add up."""
    bodies = [
        {"messages": [{"role": "user", "content": f"Question {i}"}], "max_tokens": 3 + i % 5}
        for i in range(8)
    ]
    alone = [client.post(CHAT, body).json()["choices"][0]["message"]["content"] for body in bodies]
    num_places = server.runner.engine.limits.max_batch_size + 2
    for round_ in range(6):
        calls = []
        for i in range(num_places):
            body = {**bodies[(i + round_) % 8], "stream": i % 2 == 0}
            if i == 3:
                body["temperature"] = "hot"
            calls.append((i, (i + round_) % 8, client.begin_post(CHAT, body)))
            if i == 4:
                calls[-1][2].leave()
        for i, which, call in calls:
            reply = call.wait()
            if i == 3:
                assert reply.status == 400
            elif i == 4:
                continue
            elif i % 2 == 0:
                deltas = [event["choices"][0]["delta"]["content"] for event in reply.events()]
                assert "".join(deltas) == alone[which]
            else:
                assert reply.json()["choices"][0]["message"]["content"] == alone[which]
    assert eventually(lambda: server.num_open == 0)
    samples = server.samples()
    ended = sum(v for (name, _), v in samples.items() if name == "nvlm_requests_total")
    # One that leaves at once may have been answered, or never been accepted.
    assert 8 + 6 * (num_places - 2) <= ended <= 8 + 6 * (num_places - 1)
