"""Clients of all kinds ask a real serve.py for minutes, and nothing may be lost.

    python -m bench.serving.soak --engine_dir D --minutes 10

Some read whole answers and some streams, some read slowly, leave at a random moment, or send what
is wrong. Every answer must be the one that the same question gets alone, refusals have their
status, the memory stays, every place is free again, and the metrics say what the clients saw. The
last line is JSON; with faults the exit code is 1.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from nvlm.program.command_line import ArgumentParser, positive_float, positive_int, run
from tests.support.http_server import Served, serving

PATH = "/v1/chat/completions"
JSON_TYPE = {"content-type": "application/json"}
TIMEOUT_S = 120
RETRY_S = 0.05
MAX_QUEUE_SIZE = 8
"""Fewer places than clients: some get 429 and ask again."""
MOST_GROWTH = 0.05
WARM_SHARE = 0.25  # of the time, until memory is compared
MAX_FAULTS = 20

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    body: Body
    alone: list[str]  # the texts of its choices when nobody else asks


@dataclass(slots=True)
class Findings:
    """What the clients saw. Any thread may add."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] += number

    def fault(self, text: str) -> None:
        with self.lock:
            self.counts["faults"] += 1
            if len(self.faults) < MAX_FAULTS:
                self.faults.append(text)


def picture_part(draw: random.Random) -> Body:
    """A picture of a number, of one to some tiles."""
    image = Image.new("RGB", (draw.randint(20, 400), draw.randint(20, 300)), "white")
    ImageDraw.Draw(image).text((4, 4), str(draw.randrange(10_000)), fill="black")
    data = io.BytesIO()
    image.save(data, draw.choice(("PNG", "JPEG")))
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": draw.choice(("auto", "low"))}}


def bodies(number: int, draw: random.Random) -> list[Body]:
    """Questions with and without pictures, and with settings whose answers repeat."""
    settings: tuple[Body, ...] = (
        {},
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.0, "seed": 4, "n": 2},
        {"frequency_penalty": 0.5, "ignore_eos": True},
        {"response_format": {"type": "json_object"}},
    )
    found = []
    for index in range(number):
        parts: list[Body] = [{"type": "text", "text": f"Question {index}: what is to be read?"}]
        if index % 3:
            parts.insert(draw.randrange(2), picture_part(draw))
        messages = [{"role": "user", "content": parts}]
        own = settings[index % len(settings)]
        found.append({"messages": messages, "max_tokens": draw.randint(4, 40), **own})
    return found


_NO_PICTURE = (
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "data:image/png;base64,aGVsbG8="}}]}], "max_tokens": 3}'
)
_TOO_LONG = b'{"messages": [{"role": "user", "content": "' + b"x " * 200_000 + b'"}]}'
WRONG: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[1, 2]", 400),
    (b'{"messages": 5}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "another"}', 404),
    (_NO_PICTURE, 400),
    (_TOO_LONG, 400),
)


class Client:
    """One of many: question after question until it must end."""

    def __init__(self, port: int, questions: list[Question], findings: Findings, seed: int) -> None:
        self._port, self._questions, self._findings = port, questions, findings
        self._draw = random.Random(seed)
        kinds: dict[Callable[[], None], int] = {
            self.ask_whole: 35,
            self.ask_stream: 25,
            self.read_slowly: 10,
            self.leave: 15,
            self.be_wrong: 15,
        }
        self._kinds, self._weights = list(kinds), list(kinds.values())

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            (kind,) = self._draw.choices(self._kinds, self._weights)
            try:
                kind()
            except Exception as error:
                self._findings.fault(f"{kind.__name__}: {type(error).__name__}: {error}"[:500])

    def ask_whole(self) -> None:
        question = self._draw.choice(self._questions)
        with _Connection(self._port) as connection:
            response = self._accepted(connection, question.body)
            answer = json.loads(response.read())
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        self._compare(question, texts, answer["usage"]["completion_tokens"])

    def ask_stream(self, size: int = 1 << 16, pause_s: float = 0.0) -> None:
        question = self._draw.choice(self._questions)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        with _Connection(self._port) as connection:
            response = self._accepted(connection, {**question.body, **options})
            data = b""
            while chunk := response.read1(size):
                data += chunk
                time.sleep(pause_s)
        *events, end, rest = data.decode().split("\n\n")
        assert (end, rest) == ("data: [DONE]", ""), data[-300:]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        texts = [""] * len(question.alone)
        for choice in (choice for each in chunks for choice in each["choices"]):
            texts[choice["index"]] += choice["delta"]["content"]
        self._compare(question, texts, chunks[-1]["usage"]["completion_tokens"])

    def read_slowly(self) -> None:
        self.ask_stream(self._draw.randint(16, 256), pause_s=0.01)

    def leave(self) -> None:
        """Closes the connection within the request or at any moment after it."""
        body = {**self._draw.choice(self._questions).body, "stream": self._draw.random() < 0.5}
        data = json.dumps({**body, "max_tokens": 200, "ignore_eos": True}).encode()
        with _Connection(self._port) as connection:
            connection.putrequest("POST", PATH)
            connection.putheader("content-type", "application/json")
            connection.putheader("content-length", str(len(data)))
            is_whole = self._draw.random() < 0.8
            connection.endheaders(data if is_whole else data[: len(data) // 2])
            time.sleep(self._draw.random() ** 2)
        self._findings.count("left")

    def be_wrong(self) -> None:
        data, expected = self._draw.choice(WRONG)
        with _Connection(self._port) as connection:
            while True:
                connection.request("POST", PATH, data, JSON_TYPE)
                response = connection.getresponse()
                body = response.read()
                if response.status != 429:
                    break
                self._busy()
        assert response.status == expected, f"{response.status} {body[:200]!r} for {data[:80]!r}"
        assert json.loads(body)["error"]["message"], body
        self._findings.count("wrong")

    def _accepted(self, connection: http.client.HTTPConnection, body: Body) -> Any:
        """The response, once the queue takes the question."""
        data = json.dumps(body)
        while True:
            connection.request("POST", PATH, data, JSON_TYPE)
            response = connection.getresponse()
            if response.status != 429:
                break
            assert response.getheader("retry-after"), "429 without Retry-After"
            response.read()
            self._busy()
        assert response.status == 200, f"{response.status} {response.read()[:300]!r}"
        return response

    def _busy(self) -> None:
        self._findings.count("busy")
        time.sleep(RETRY_S * (1 + self._draw.random()))

    def _compare(self, question: Question, texts: list[str], num_tokens: int) -> None:
        self._findings.count("answers")
        self._findings.count("tokens", num_tokens)
        if texts != question.alone:
            asked = json.dumps(question.body)[-200:]
            self._findings.fault(f"{texts} is not {question.alone}, what it is alone: {asked}")


class _Connection(http.client.HTTPConnection):
    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, timeout=TIMEOUT_S)

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ask_alone(served: Served, body: Body) -> Question:
    texts = [choice["message"]["content"] for choice in served.ask(**body)["choices"]]
    return Question(body, texts)


def resident_bytes(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


def watch_memory(pid: int, until: float) -> list[int]:
    """Sizes, one each half second."""
    sizes = []
    while time.monotonic() < until:
        sizes.append(resident_bytes(pid))
        time.sleep(0.5)
    return sizes


def growth(sizes: list[int]) -> float:
    """The share by which the last quarter's median exceeds that of the first after the warm-up."""
    quarter, begin = max(1, len(sizes) // 4), int(WARM_SHARE * len(sizes))
    early = statistics.median(sizes[begin : begin + quarter])
    return statistics.median(sizes[-quarter:]) / early - 1


def check_end(served: Served, before: dict[str, float], findings: Findings) -> dict[str, float]:
    """What the metrics must say once all clients are gone."""
    for name in ("nvlm_num_requests_running", "nvlm_num_requests_waiting"):
        served.wait_for_sample(name, 0)
    samples = served.samples()
    ends = {}
    for outcome in ("stop", "length", "refused", "failed", "cancelled", "busy"):
        name = f'nvlm_requests_total{{outcome="{outcome}"}}'
        ends[outcome] = samples.get(name, 0.0) - before.get(name, 0.0)
    counts = findings.counts
    answered = ends["stop"] + ends["length"]
    # Who leaves may have been answered meanwhile, or have met a full queue.
    if not 0 <= answered - counts["answers"] <= counts["left"]:
        findings.fault(f"{answered} were answered, and the clients have {counts['answers']}")
    if not 0 <= ends["busy"] - counts["busy"] <= counts["left"]:
        findings.fault(f"{ends['busy']} met a full queue, and the clients say {counts['busy']}")
    if ends["cancelled"] > counts["left"] or ends["failed"]:
        findings.fault(f"{ends} beside {dict(counts)}")
    tokens = "nvlm_generation_tokens_total"
    generated = samples[tokens] - before.get(tokens, 0.0)
    if generated < counts["tokens"]:
        findings.fault(f"{generated} tokens were generated, and the clients have more: {counts}")
    if samples["nvlm_kv_cache_usage_perc"] != 0:
        findings.fault(f"KV blocks are lost: {samples['nvlm_kv_cache_usage_perc']}")
    return ends


def soak(
    served: Served, seconds: float, num_clients: int, num_questions: int, seed: int
) -> tuple[dict[str, Any], Findings]:
    """The figures by name, and what was seen."""
    findings = Findings()
    questions = [ask_alone(served, body) for body in bodies(num_questions, random.Random(seed))]
    before = served.samples()
    until = time.monotonic() + seconds
    clients = [Client(served.port, questions, findings, seed + i) for i in range(num_clients)]
    threads = [threading.Thread(target=client.work, args=(until,)) for client in clients]
    for thread in threads:
        thread.start()
    sizes = watch_memory(served.process.pid, until)
    for thread in threads:
        thread.join()
    ends = check_end(served, before, findings)
    for question in questions:
        if ask_alone(served, question.body) != question:
            findings.fault(f"asked again alone it is another answer: {question.alone}")
    figures: dict[str, Any] = {
        "seconds": seconds,
        "num_clients": num_clients,
        "clients": dict(findings.counts),
        "server": ends,
        "first_mib": sizes[0] >> 20,
        "last_mib": sizes[-1] >> 20,
        "memory_growth": round(growth(sizes), 4),
    }
    return figures, findings


def main() -> int:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=positive_float, default=10.0)
    parser.add_argument("--num_clients", type=positive_int, default=32)
    parser.add_argument("--num_questions", type=positive_int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        flags = ("--access_log", "none", "--max_queue_size", MAX_QUEUE_SIZE)
        with serving(given.engine_dir, Path(name), *flags) as served:
            seconds = 60 * given.minutes
            figures, findings = soak(
                served, seconds, given.num_clients, given.num_questions, given.seed
            )
    if figures["memory_growth"] > MOST_GROWTH:
        findings.fault(f"memory grew by {figures['memory_growth']:.1%}")
    print(json.dumps({**figures, "faults": findings.faults}))
    return 1 if findings.faults else 0


if __name__ == "__main__":
    run(main)
