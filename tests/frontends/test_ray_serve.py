"""Replicas on a Ray cluster of this machine, started by the command, asked as clients ask."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("ray", reason="requirements/ray.txt is not installed")
pytest.importorskip("fastapi", reason="requirements/ray.txt is not installed")

from bench.serving.replicas import fixed_step_options, measure
from frontends.ray_serve.cluster import deploy
from tests.conftest import FP32, Workshop
from tests.support.command import ROOT
from tests.support.ray_cluster import Application, body, cluster, free_port
from tests.support.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.process, pytest.mark.timeout(600)]

TRAINED = ROOT / "models" / "nvlm-d-tiny"
BATCH = 2
ANSWERED_S = 10.0  # or refused, after a replica's death


@pytest.fixture(scope="module")
def application(
    workshop: Workshop, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Application]:
    checkpoint = workshop.checkpoint("served_checkpoint", TRAINED, FP32)
    engine = workshop.engine("ray_engine", checkpoint, vision="torch", max_batch_size=BATCH)
    with cluster(num_cpus=3) as address:
        made = Application(address, free_port(), engine)
        done = made.deploy("--num_replicas", 2)
        assert done.returncode == 0, done.stderr
        assert f"ready: http://127.0.0.1:{made.port}/v1 serves nvlm-d by 2 replicas" in done.stderr
        yield made


@dataclass(frozen=True, slots=True)
class Got:
    status: int
    data: bytes
    seconds: float

    @property
    def is_answer(self) -> bool:
        return self.status == 200 and b'"error"' not in self.data


def ask(application: Application, asked: Any, path: str = "/v1/chat/completions") -> Got:
    begun = time.monotonic()
    request = urllib.request.Request(
        application.url + path, json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return Got(response.status, response.read(), time.monotonic() - begun)
    except urllib.error.HTTPError as error:
        return Got(error.code, error.read(), time.monotonic() - begun)


def of_picture(number: int, text: str) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (number * 20, 90, 200 - number * 10)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 2}


def test_a_picture_asked_twice_lands_where_its_blocks_are(application: Application) -> None:
    numbers = range(10)
    before = application.by_replica("nvlm_mm_cache_queries_total")
    for number in numbers:
        assert ask(application, of_picture(number, "What is it?")).is_answer
    first = application.by_replica("nvlm_mm_cache_queries_total")
    for number in numbers:
        got = ask(application, of_picture(number, "And its colour?"))
        usage = json.loads(got.data)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0, number
    second = application.by_replica("nvlm_mm_cache_queries_total")
    hits = application.by_replica("nvlm_mm_cache_hits_total")
    assert sum(hits.values()) == len(numbers), hits
    for replica in before:
        num_asked = first[replica] - before[replica]
        assert second[replica] - first[replica] == num_asked == hits[replica], replica
        assert num_asked > 0, f"{replica} got no picture of {len(numbers)}: {first}"


def test_a_conversation_continues_where_it_began(application: Application) -> None:
    messages = body("What is the number of the first scan that I have here?")["messages"]
    first = json.loads(ask(application, {"messages": messages, "max_tokens": 4}).data)
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    messages += [said, {"role": "user", "content": "And of the second?"}]
    second = json.loads(ask(application, {"messages": messages, "max_tokens": 4}).data)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_one_conversation_spills_over_to_the_other_replica(application: Application) -> None:
    before = application.by_replica("nvlm_generation_tokens_total")
    asked = body("The same for all", max_tokens=60, ignore_eos=True)
    with ThreadPoolExecutor(4 * BATCH) as pool:
        answers = list(pool.map(lambda _: ask(application, asked), range(4 * BATCH)))
    assert all(each.is_answer for each in answers)
    after = application.by_replica("nvlm_generation_tokens_total")
    shares = sorted(after[each] - before[each] for each in after)
    assert shares[0] >= 60, "the other replica answers too"


def test_a_stream_comes_as_it_is_written_and_ends_with_its_client(application: Application) -> None:
    connection = HTTPConnection("127.0.0.1", application.port, timeout=60)
    asked = body("Go on", max_tokens=1000, ignore_eos=True, stream=True)
    kind = {"content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), kind)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: {")
    running = application.by_replica("nvlm_num_requests_running")
    assert sum(running.values()) == 1, "it is not collected until it is whole"
    response.close()
    connection.close()
    assert eventually(
        lambda: not any(application.by_replica("nvlm_num_requests_running").values()), 10
    ), "a client that goes away frees its place"


def test_refusals_are_those_of_one_server(application: Application) -> None:
    wrong = ask(application, body("Hello", temperature=-1))
    assert (wrong.status, json.loads(wrong.data)["error"]["param"]) == (400, "temperature")
    assert ask(application, body("Hello", model="gpt-4o")).status == 404
    assert ask(application, [1]).status == 400
    assert ask(application, {}, "/nowhere").status == 404
    request = urllib.request.Request(f"{application.url}/", headers={"host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


class Load:
    """Clients that ask until the context ends, each one conversation after the other."""

    def __init__(self, application: Application, num_clients: int = 4) -> None:
        self._application = application
        self._is_over = threading.Event()
        self.got: list[tuple[float, Got]] = []  # begun, what came
        self._threads = [
            threading.Thread(target=self._ask, args=(client,)) for client in range(num_clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client: int) -> None:
        number = 0
        while not self._is_over.is_set():
            number += 1
            asked = body(f"{client} {number}", max_tokens=40, ignore_eos=True)
            begun = time.monotonic()
            self.got.append((begun, ask(self._application, {**asked, "stream": client % 2 == 0})))

    def wait_for_answers(self, number: int) -> None:
        """More of them, of questions that are asked from now on."""
        now = time.monotonic()
        assert eventually(
            lambda: sum(got.is_answer for begun, got in self.got if begun > now) >= number, 120
        ), [got for _, got in self.got]


def test_after_a_replica_is_killed_every_request_is_answered_or_refused(
    application: Application,
) -> None:
    with Load(application) as load:
        load.wait_for_answers(4)
        victim = application.replica_pids()[0]
        os.kill(victim, signal.SIGKILL)
        load.wait_for_answers(10)
        assert eventually(lambda: len(set(application.replica_pids()) - {victim}) == 2, 60)
    refused = [got for _, got in load.got if not got.is_answer]
    for got in refused:
        assert got.status == 503 or (got.status == 200 and b'"not_ready"' in got.data), got
    assert max(got.seconds for got in refused) < ANSWERED_S if refused else True
    assert len(refused) <= 4, "what was open, at most"


def test_a_server_that_ends_takes_its_replica_along(application: Application) -> None:
    assert eventually(lambda: len(application.by_replica("nvlm_num_requests_running")) == 2, 60)
    victim = application.replica_pids()[0]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0") if path.exists() else []
        if b"frontends.ray_serve.tied" in words:
            continue
        is_ours = str(application.engine_dir).encode() in words and b"--port" in words
        if is_ours and _grandparent(path.parent) == victim:
            os.kill(int(path.parent.name), signal.SIGKILL)
    assert eventually(lambda: victim not in application.replica_pids(), 10)
    assert ask(application, body("Is somebody there?")).is_answer
    assert eventually(lambda: len(application.by_replica("nvlm_num_requests_running")) == 2, 60)


def _grandparent(process: Path) -> int:
    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
    return int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_rolling_restart_loses_nothing(application: Application) -> None:
    before = set(application.by_replica("nvlm_num_requests_running"))
    with Load(application) as load:
        load.wait_for_answers(2)
        done = application.deploy("--num_replicas", 2)
        load.wait_for_answers(4)
    assert done.returncode == 0, done.stderr
    assert [got for _, got in load.got if not got.is_answer] == []
    after = set(application.by_replica("nvlm_num_requests_running"))
    assert len(after) == 2
    assert not before & after, "each was replaced"


def test_two_replicas_give_twice_what_one_does(application: Application) -> None:
    rates = []
    for num_replicas in (1, 2):
        deploy(fixed_step_options(application.engine_dir, num_replicas, 25.0), "127.0.0.1", 0)
        found = measure(application.port, 4 * BATCH * num_replicas, seconds=16.0)
        rates.append(found["tokens_per_s"])
    assert rates[1] / rates[0] == pytest.approx(2, rel=0.15), rates


def test_replicas_come_with_the_load(application: Application) -> None:
    flags = ("--min_replicas", 1, "--max_replicas", 2, "--target_ongoing_requests", 1)
    done = application.deploy(*flags, "--upscale_delay_s", 2, "--downscale_delay_s", 2)
    assert done.returncode == 0, done.stderr
    assert "by 1 to 2 replicas" in done.stderr
    assert eventually(lambda: len(application.by_replica("nvlm_num_requests_running")) == 1, 60)
    with Load(application):
        assert eventually(lambda: len(application.by_replica("nvlm_num_requests_running")) == 2, 90)
    assert eventually(lambda: len(application.by_replica("nvlm_num_requests_running")) == 1, 120)
    assert ask(application, body("Still there?")).is_answer


def test_more_than_the_cluster_has_is_one_line(application: Application) -> None:
    for flags, message in (
        (("--num_gpus", 1), "1 replicas with 1 GPUs each need 1, and the cluster has 0"),
        (("--num_replicas", 9), "9 replicas with 1 CPUs each need 9, and the cluster has 3"),
    ):
        done = application.deploy(*flags)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1]
