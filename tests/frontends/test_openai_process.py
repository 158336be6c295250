"""serve.py as a user starts it, asked by the `openai` package and by clients that misbehave."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import FP32, Workshop
from tests.faults.http_deaths import launchers_of, rank_pid, serving_on_ranks
from tests.support.command import ROOT
from tests.support.http_server import Served, serving
from tests.support.ranks import engine_of, needs_mpi

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="requirements/serving.txt is not installed")

pydantic = pytest.importorskip("pydantic", reason="requirements/test.txt is not installed")

if TYPE_CHECKING:
    import openai
    import pydantic

TRAINED = ROOT / "models" / "nvlm-d-tiny"
SCAN = ROOT / "examples" / "scan_1642.png"
LONG = 700  # tokens that the random model writes while a test looks at it


@pytest.fixture(scope="module")
def trained(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkpoint = workshop.checkpoint("served_checkpoint", TRAINED, FP32)
    engine = workshop.engine("served_engine", checkpoint, vision="torch", max_num_images=2)
    with serving(engine, tmp_path_factory.mktemp("served"), "--max_queue_size", "1") as served:
        yield served


@pytest.fixture(scope="module")
def client(trained: Served) -> openai.OpenAI:
    package = pytest.importorskip("openai", reason="requirements/test.txt is not installed")
    made: openai.OpenAI = package.OpenAI(
        base_url=f"{trained.url}/v1", api_key="none", max_retries=8
    )
    return made


def question(path: Path = SCAN) -> list[Any]:
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "Read the number."},
    ]
    return [{"role": "user", "content": parts}]


def test_the_openai_package_reads_a_picture(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    answer = client.chat.completions.create(model=model.id, messages=question(), max_tokens=20)
    assert answer.choices[0].message.content == "1642"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    stream = client.chat.completions.create(
        model=model.id,
        messages=question(),
        stream=True,
        stream_options={"include_usage": True},
    )
    *pieces, last = list(stream)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "1642"
    assert pieces[-1].choices[0].finish_reason == "stop"
    assert last.usage.total_tokens == answer.usage.total_tokens


def test_the_example_for_curl_asks_any_question(trained: Served) -> None:
    command = ["bash", ROOT / "examples/openai_curl.sh", SCAN, 'Read the "number".\n\\']
    environment = {**os.environ, "SERVER": trained.url}
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert json.loads(printed)["choices"], printed


def test_the_openai_package_gets_several_answers_with_log_probabilities(
    client: openai.OpenAI,
) -> None:
    answer = client.chat.completions.create(
        model="nvlm-d",
        messages=question(),
        max_tokens=8,
        n=3,
        temperature=0.5,
        seed=1,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert choice.message.content == "".join(each.token for each in choice.logprobs.content)
        for each in choice.logprobs.content:
            assert each.logprob <= 0
            assert [likely.logprob for likely in each.top_logprobs] == sorted(
                (likely.logprob for likely in each.top_logprobs), reverse=True
            )


class Reading(pydantic.BaseModel):
    is_number: bool


def test_the_openai_package_parses_an_answer_of_its_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="nvlm-d", messages=question(), max_tokens=200, response_format=Reading
    )
    assert isinstance(answer.choices[0].message.parsed, Reading), answer


def test_the_openai_package_names_the_field_that_is_wrong(client: openai.OpenAI) -> None:
    import openai as package

    with pytest.raises(package.BadRequestError) as raised:
        client.chat.completions.create(model="nvlm-d", messages=question(), temperature=1e9)
    assert raised.value.param == "temperature"
    with pytest.raises(package.NotFoundError):
        client.chat.completions.create(model="gpt-4o", messages=question())


def test_the_openai_package_comes_again_where_the_queue_is_full(
    client: openai.OpenAI, trained: Served
) -> None:
    def ask(_: int) -> str | None:
        answer = client.chat.completions.create(
            model="nvlm-d", messages=question(), max_tokens=20, timeout=60
        )
        return answer.choices[0].message.content

    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(ask, range(20))) == {"1642"}
    assert trained.samples()['nvlm_requests_total{outcome="busy"}'] > 0


def raw(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def http(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def long_question(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"messages": messages, "max_tokens": LONG, "ignored": 1, **fields}


@pytest.fixture
def random(float32_engine_dir: Path, tmp_path: Path) -> Iterator[Served]:
    """Its answers are long."""
    with serving(
        float32_engine_dir, tmp_path, "--header_timeout_s", "1", "--body_timeout_s", "2"
    ) as served:
        yield served


def test_clients_that_misbehave_cost_no_place(random: Served) -> None:
    served, cancelled = random, 'nvlm_requests_total{outcome="cancelled"}'
    for number, stream in enumerate((False, True), start=1):
        connection = raw(served.port, http(long_question(stream=stream)))
        served.wait_for_sample("nvlm_num_requests_running", 1)
        connection.close()
        served.wait_for_sample(cancelled, number)
        served.wait_for_sample("nvlm_num_requests_running", 0)
    slow = raw(served.port, b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX: ")
    begun = time.monotonic()
    assert slow.recv(1) == b"", "headers that never end"
    assert 0.5 < time.monotonic() - begun < 5
    large = raw(served.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000)
    assert large.recv(12) == b"HTTP/1.1 400"
    large.close()
    half = raw(served.port, http(long_question())[:-5])
    answer = b"".join(iter(lambda: half.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408"), "a body that never ends"
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade, close\r\n"
    other = raw(served.port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n")
    assert other.recv(12) == b"HTTP/1.1 200"
    assert "pip install" not in served.log.read_text()
    early = raw(served.port, b"POST /no HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}}"):
        answer += early.recv(4096)
    assert answer.startswith(b"HTTP/1.1 404")
    early.sendall(b"{}")
    time.sleep(1.5)  # longer than headers may take
    early.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert early.recv(4096).startswith(b"HTTP/1.1 200"), "the connection was kept"
    begun = time.monotonic()
    unread = raw(served.port, http(long_question(stream=True)))
    assert served.ask()["choices"]
    unread.close()
    served.wait_for_sample("nvlm_num_requests_running", 0)


def test_sigterm_answers_what_was_accepted_and_refuses_the_rest(random: Served) -> None:
    served = random
    connection = raw(served.port, http(long_question(stream=True)))
    served.wait_for_sample("nvlm_num_requests_running", 1)
    served.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while "stopping: 1 requests" not in served.log.read_text():
        assert time.monotonic() < deadline, served.log.read_text()
        time.sleep(0.01)
    with pytest.raises(urllib.error.HTTPError) as raised:
        served.ask()
    assert raised.value.code == 503
    assert raised.value.headers["retry-after"]
    data = b""
    while not data.endswith(b"0\r\n\r\n") and (chunk := connection.recv(1 << 16)):
        data += chunk
    assert b"data: [DONE]" in data
    assert served.process.wait(20) == 0


def test_sigterm_does_not_wait_for_a_body_that_never_ends(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    with serving(float32_engine_dir, tmp_path) as served:
        half = raw(served.port, http(long_question())[:-5])
        time.sleep(0.2)
        served.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        answer = b"".join(iter(lambda: half.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"not_ready"' in answer
        assert served.process.wait(20) == 0
        assert time.monotonic() - begun < 10
    assert "Traceback" not in served.log.read_text()


def test_sigterm_waits_no_longer_than_the_flag_says(
    float32_engine_dir: Path, tmp_path: Path
) -> None:
    with serving(float32_engine_dir, tmp_path, "--drain_s", "0.2") as served:
        connection = raw(served.port, http(long_question()))
        served.wait_for_sample("nvlm_num_requests_running", 1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        connection.close()
    assert "1 requests were not answered within 0.2 s" in served.log.read_text()


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("end", ["terminated", "killed"])
def test_ranks_serve_together_and_end_together(
    workshop: Workshop, tmp_path: Path, end: str
) -> None:
    with serving_on_ranks(engine_of(workshop, 2, FP32), tmp_path) as served:
        process = served.process
        assert served.ask()["choices"]
        if end == "terminated":
            os.kill(rank_pid(tmp_path, 0), signal.SIGTERM)
            assert process.wait(30) == 0, served.log.read_text()
        else:
            os.kill(rank_pid(tmp_path, 1), signal.SIGKILL)
            assert process.wait(30) != 0


@needs_mpi
@pytest.mark.mpi
def test_a_rank_that_is_killed_is_unhealthy_before_the_end(
    workshop: Workshop, tmp_path: Path
) -> None:
    """With a launcher that does not end the others, as one of a cluster may do: this one sleeps."""
    with serving_on_ranks(engine_of(workshop, 2, FP32), tmp_path) as served:
        process = served.process
        assert served.health() == 200
        leader = rank_pid(tmp_path, 0)
        asleep = launchers_of(tmp_path)
        for pid in asleep:
            os.kill(pid, signal.SIGSTOP)
        os.kill(rank_pid(tmp_path, 1), signal.SIGKILL)
        deadline = time.monotonic() + 5
        while served.health() == 200:
            assert time.monotonic() < deadline, "a rank is dead and nobody knows"
        assert served.health() == 503
        while Path(f"/proc/{leader}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "the leader continues"
            time.sleep(0.05)
        for pid in asleep:
            os.kill(pid, signal.SIGCONT)
        assert process.wait(30) != 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--engine_dir", "none"), "error: none does not exist"),
        (("--engine_dir", "none", "--host", "300.1.1.1"), "error: cannot listen on 300.1.1.1"),
    ],
)
def test_a_mistake_is_all_that_serve_prints(flags: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "serve.py", *flags, "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
