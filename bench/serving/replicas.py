"""What replicas of a Ray Serve application add, and what Ray costs a token.

    python -m bench.serving.replicas --engine_dir work/demo/engine [--num_replicas 2 --seconds 64]

Each replica is serve.py with a decoder whose step takes --step_ms, so that cores shared by all do
not count. Every question is another conversation. Prints tokens/s of one replica and of several,
the milliseconds to a first event, and, as the last line, all of it as JSON.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.serving.http import cpu_seconds
from bench.serving.http_clients import Answered, Body, drive
from frontends.ray_serve.cluster import connected, deploy
from frontends.ray_serve.options import LOCAL, Options, read_options
from nvlm.program.command_line import ArgumentParser, port_number, positive_float, positive_int, run
from tests.support.metrics import samples_at

NUM_TOKENS = 32
_OBJECT_STORE_BYTES = 100 << 20
_WARM_S = 6.0
_HOST = "127.0.0.1"
_ON_THE_WAY = {
    "proxy": "ray::ProxyActor",
    "ingress": "ray::ServeReplica:nvlm:Ingress",
    "replica": "ray::ServeReplica:nvlm:Replica",
}


def fixed_step_options(engine_dir: Path, num_replicas: int, step_ms: float) -> Options:
    flags = ["--engine_dir", str(engine_dir), "--device", "cpu", "--access_log", "none"]
    options = read_options([*flags, "--num_replicas", str(num_replicas)], num_cluster_gpus=0)
    python, _, *server_flags = options.command
    program = ("-m", "bench.serving.fixed_step", "--step_ms", str(step_ms))
    return replace(options, command=(python, *program, *server_flags))


def measure(port: int, num_streams: int, seconds: float) -> dict[str, float]:
    """While all streams are open: their beginning and their end are left out."""
    end = time.perf_counter() + _WARM_S + seconds
    answers: list[Answered] = []
    clients = threading.Thread(
        target=lambda: answers.extend(drive(port, _conversations(end), num_streams))
    )
    clients.start()
    time.sleep(_WARM_S)
    begun, before, cpu_before = time.perf_counter(), _tokens(port), _cpu_seconds()
    time.sleep(end - time.perf_counter())
    took, written = time.perf_counter() - begun, _tokens(port)
    by_replica = {name: number - before.get(name, 0.0) for name, number in written.items()}
    num_tokens = sum(by_replica.values())
    cpu_ms = {
        f"cpu_ms_per_token_of_{name}": 1e3 * (seconds - cpu_before[name]) / num_tokens
        for name, seconds in _cpu_seconds().items()
    }
    clients.join()
    assert answers, "the clients end with an answer each"
    assert {answer.num_tokens for answer in answers} == {NUM_TOKENS}, "a token is missing"
    rates = {f"tokens_per_s_of_{name}": number / took for name, number in by_replica.items()}
    return {"tokens_per_s": num_tokens / took, **rates, **cpu_ms}


def _tokens(port: int) -> dict[str, float]:
    """What each replica has written so far."""
    found = {}
    for name, value in samples_at(f"http://{_HOST}:{port}/metrics").items():
        if name.startswith("nvlm_generation_tokens_total"):
            found[name.partition('"')[2].partition('"')[0]] = value
    return found


def _cpu_seconds() -> dict[str, float]:
    """Processor seconds by kind of Ray's processes on a token's way; serve.py's do not count."""
    found = dict.fromkeys(_ON_THE_WAY, 0.0)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            title = path.read_text(errors="replace")
            for name, start in _ON_THE_WAY.items():
                if title.startswith(start):
                    found[name] += cpu_seconds(int(path.parent.name))
    return found


def _conversations(deadline: float) -> Iterator[Body]:
    number = 0
    while time.perf_counter() < deadline:
        number += 1
        message: dict[str, Any] = {"role": "user", "content": f"Question {number}"}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        yield {"messages": [message], "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}


def main() -> None:
    parser = ArgumentParser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine_dir", type=Path, required=True, help="its batch bounds streams")
    parser.add_argument("--num_replicas", type=positive_int, default=2)
    parser.add_argument("--step_ms", type=float, default=100.0, help="a step of a decoder takes")
    parser.add_argument("--seconds", type=positive_float, default=64.0, help="of measuring")
    parser.add_argument("--port", type=port_number, default=8100)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    resources = {"num_cpus": arguments.num_replicas, "object_store_memory": _OBJECT_STORE_BYTES}
    with connected(LOCAL, **resources):
        for num_replicas in (1, arguments.num_replicas):
            options = fixed_step_options(arguments.engine_dir, num_replicas, arguments.step_ms)
            deploy(options, _HOST, arguments.port)
            # Twice the places of all batches: each has some that wait, and none stands idle.
            num_streams = 2 * options.spill_at * arguments.num_replicas
            figures = measure(arguments.port, num_streams, arguments.seconds)
            found[f"replicas_{num_replicas}"] = figures
            for name, value in figures.items():
                print(f"{num_replicas} replicas: {name} {value:.2f}", flush=True)
    one, several = (each["tokens_per_s"] for each in found.values())
    print(json.dumps({**found, "ratio": round(several / one, 3)}))


if __name__ == "__main__":
    run(main)
