"""What the HTTP door itself can move: a decoder that takes no time, asked over real connections.

    python -m bench.serving.http --engine_dir work/demo/engine [--num_streams 64 --seconds 10]

Two processes: the server, and the clients, which read every event and check how many came. The
decoder gives each request the same token at once. Prints streamed tokens/s, requests/s of one
token, and the milliseconds from a question to its first event.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.serving.http_clients import Answered, Body, drive
from frontends.openai.app import application
from frontends.openai.door import Door, DoorOptions
from frontends.openai.http_server import HttpServer
from frontends.openai.listener import open_listener
from frontends.openai.protocol import Timeouts
from nvlm.planning.limits import EngineLimits
from nvlm.program.command_line import ArgumentParser, positive_float, positive_int, run
from runtime.decoder.executor import DecoderRequest, StepOutput
from runtime.requests.types import FinishReason
from runtime.serving.runner import Runner
from runtime.serving.server import Server

NUM_TOKENS = 128


class InstantDecoder:
    """A `DecoderExecutor` whose step takes `step_s`, and gives every request `token_id`."""

    def __init__(self, limits: EngineLimits, token_id: int, step_s: float = 0.0) -> None:
        self.limits = limits
        self._token_id, self._step_s = token_id, step_s
        self._left: dict[int, int] = {}
        self._next_id = 0

    def submit(self, request: DecoderRequest) -> int:
        self._next_id += 1
        self._left[self._next_id] = request.max_new_tokens
        return self._next_id

    def step(self) -> list[StepOutput]:
        if self._step_s:
            time.sleep(self._step_s)
        outputs = []
        for request_id in list(self._left):
            self._left[request_id] -= 1
            is_last = self._left[request_id] == 0
            if is_last:
                del self._left[request_id]
            reason: FinishReason | None = "length" if is_last else None
            outputs.append(StepOutput(request_id, self._token_id, reason))
        return outputs

    def cancel(self, request_id: int) -> None:
        self._left.pop(request_id, None)

    def close(self) -> None:
        pass


def serve(engine_dir: Path, step_s: float, pipe: Connection) -> None:
    """The server's process, until the pipe says something."""
    runner = Runner.open(engine_dir, torch.device("cpu"))
    token_id = runner.tokenizer.encode("x")[0]
    runner.decoder.close()
    runner.decoder = InstantDecoder(runner.engine.limits, token_id, step_s)
    door = Door(DoorOptions())
    server = Server(runner)
    door.open(server)
    with HttpServer(application(door), open_listener("127.0.0.1", 0), Timeouts()) as http:
        pipe.send(http.port)
        pipe.recv()
    server.close()
    door.close()


def until(deadline: float, body: Body) -> Iterator[Body]:
    """The same question again and again."""
    while time.perf_counter() < deadline:
        yield body


def drive_for(port: int, num_streams: int, seconds: float, body: Body) -> list[Answered]:
    return drive(port, until(time.perf_counter() + seconds, body), num_streams)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, pid: int, num_streams: int, seconds: float) -> dict[str, float]:
    """The figures by name. pid: the server's."""
    messages = [{"role": "user", "content": "How much?"}]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = {"messages": messages, "max_tokens": NUM_TOKENS, **options}
    drive_for(port, num_streams, min(1.0, seconds), streamed)  # warm
    begun, begun_cpu = time.perf_counter(), cpu_seconds(pid)
    answers = drive_for(port, num_streams, seconds, streamed)
    streamed_s, streamed_cpu = time.perf_counter() - begun, cpu_seconds(pid) - begun_cpu
    num_tokens = sum(answer.num_tokens for answer in answers)
    for answer in answers:  # a token is an x
        assert answer.num_characters == answer.num_tokens == NUM_TOKENS, "a token is missing"
    begun = time.perf_counter()
    single = drive_for(port, num_streams, seconds, {"messages": messages, "max_tokens": 1})
    single_s = time.perf_counter() - begun
    return {
        "streamed_tokens_per_s": num_tokens / streamed_s,
        "events_per_s": sum(answer.num_events for answer in answers) / streamed_s,
        "server_cpu_us_per_token": 1e6 * streamed_cpu / num_tokens,
        "requests_per_s": len(single) / single_s,
        "median_first_event_ms": statistics.median(answer.first_ms for answer in answers),
    }


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine_dir", type=Path, required=True, help="its batch bounds streams")
    parser.add_argument("--num_streams", type=positive_int, default=64)
    parser.add_argument("--seconds", type=positive_float, default=10.0)
    parser.add_argument("--step_ms", type=float, default=0.0, help="a step of the decoder takes")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    target: Callable[..., None] = serve
    process = context.Process(
        target=target, args=(arguments.engine_dir, arguments.step_ms / 1e3, theirs)
    )
    process.start()
    try:
        port = ours.recv()
        assert process.pid is not None
        values = measure(port, process.pid, arguments.num_streams, arguments.seconds)
        ours.send("end")
    finally:
        process.join(30)
        process.kill()
    print(json.dumps({name: round(value, 1) for name, value in values.items()}))


if __name__ == "__main__":
    run(main)
