"""Triton with many clients against the same requests one after another.

    python -m bench.serving.triton_server [--engine_dir D] [--num_requests N --num_clients N]

Without an engine it makes one of random weights. Requests have no, one or three images and 8 to 64
tokens, mixed; every client streams over gRPC and sends its next request when an answer is whole.
Time to first token is until the first text; time per token divides the rest by the tokens after
the first. The server, and these clients, share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc.aio as grpcclient

from bench.machine import describe
from build.conversion.convert import ConvertOptions, convert
from build.engines.build import build_engine
from build.engines.specification import BuildOptions, specify
from build.sources.hugging_face import HuggingFaceSource
from frontends.triton.render import ServeOptions, form_of, render
from frontends.triton.server import Ports, TritonServer
from nvlm.planning.device_memory import total_memory_bytes
from runtime.engine.engine_dir import EngineDir
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint

CPU = torch.device("cpu")
PICTURES = Path(__file__).parents[2] / "build" / "conversion" / "calibration" / "calibration_data"
NAMES = ("chelsea.jpg", "rocket.jpg", "receipt.png")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one answer."""

    first_token: float
    per_token: float
    num_tokens: int


def make_engine(folder: Path, preset: str, max_batch_size: int) -> Path:
    write_random_checkpoint(folder / "model", PRESETS[preset])
    source = HuggingFaceSource(folder / "model")
    convert(source, folder / "checkpoint", ConvertOptions(calib_size=2), CPU)
    options = BuildOptions(vision="torch", max_num_images=3, max_batch_size=max_batch_size)
    spec = specify(folder / "checkpoint", options, CPU, total_memory_bytes(CPU))
    build_engine(spec, folder / "engine", options)
    return folder / "engine"


def inputs(number: int) -> list[grpcclient.InferInput]:
    """Request `number`: a question, its pictures and its limit."""
    files = [(PICTURES / name).read_bytes() for name in NAMES[: (0, 1, 0, 3)[number % 4]]]
    arrays = {
        "text_input": (np.array([[f"Question {number}?".encode()]], np.object_), "BYTES"),
        "max_tokens": (np.array([[8 + 8 * (number % 8)]], np.int32), "INT32"),
        "stream": (np.array([[True]]), "BOOL"),
        "end_id": (np.array([[-1]], np.int32), "INT32"),
    }
    if files:
        arrays["image_bytes"] = (np.array([files], np.object_), "BYTES")
    return [
        grpcclient.InferInput(name, array.shape, kind).set_data_from_numpy(array)
        for name, (array, kind) in arrays.items()
    ]


async def ask(client: Any, number: int) -> Timing:
    async def one() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": "nvlm", "inputs": inputs(number)}

    sent, first, num_tokens = time.perf_counter(), None, 0
    async for result, error in client.stream_infer(one()):
        if error is not None:
            raise RuntimeError(str(error))
        first = first or time.perf_counter()
        if result.as_numpy("num_tokens") is not None:
            num_tokens = int(result.as_numpy("num_tokens").item())
    assert first is not None, "no answer"
    seconds = time.perf_counter() - first
    return Timing(first - sent, seconds / max(1, num_tokens - 1), num_tokens)


async def run(url: str, num_requests: int, num_clients: int) -> dict[str, Any]:
    """All requests, shared out to clients as they become free."""
    numbers = iter(range(num_requests))

    async def client() -> list[Timing]:
        async with grpcclient.InferenceServerClient(url) as connection:
            return [await ask(connection, number) for number in numbers]

    started = time.perf_counter()
    parts = await asyncio.gather(*(client() for _ in range(num_clients)))
    seconds = time.perf_counter() - started
    timings = [timing for part in parts for timing in part]
    assert len(timings) == num_requests, "a request was lost"
    num_tokens = sum(timing.num_tokens for timing in timings)
    return {
        "num_clients": num_clients,
        "seconds": seconds,
        "requests_per_s": num_requests / seconds,
        "tokens_per_s": num_tokens / seconds,
        "first_token_ms": percentiles([1e3 * timing.first_token for timing in timings]),
        "per_token_ms": percentiles([1e3 * t.per_token for t in timings if t.num_tokens > 1]),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94]}


def batch_sums(port: int) -> tuple[float, float]:
    """(sum, count) of the decode batch sizes so far."""
    time.sleep(1)  # the exporter's turn
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[:5] == "nvlm_")
    return tuple(float(values[f"nvlm_decode_batch_size_{end}"]) for end in ("sum", "count"))  # type: ignore[return-value]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine_dir", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--max_batch_size", type=int, default=16, help="of the engine it makes")
    parser.add_argument("--num_requests", type=int, default=200)
    parser.add_argument("--num_clients", type=int, default=16)
    parser.add_argument("--num_threads", type=int, default=1, help="of the server's torch")
    arguments = parser.parse_args()
    num_requests, num_clients = arguments.num_requests, arguments.num_clients
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine_dir = arguments.engine_dir or make_engine(
            folder, arguments.preset, arguments.max_batch_size
        )
        engine = EngineDir.read(engine_dir)
        ports = Ports("127.0.0.1", free_port(), free_port(), free_port())
        repository = folder / "models"
        repository.mkdir()
        options = ServeOptions(
            form_of(engine), num_threads=arguments.num_threads, grpc_url=ports.grpc_url
        )
        render(engine, repository, options)
        with TritonServer(repository, folder, ports) as server:
            server.wait_until_ready(600)
            url = f"127.0.0.1:{ports.grpc}"
            asyncio.run(run(url, 2 * num_clients, num_clients))  # warm-up
            alone = asyncio.run(run(url, num_requests, 1))
            before = batch_sums(ports.metrics)
            together = asyncio.run(run(url, num_requests, num_clients))
            after = batch_sums(ports.metrics)
    result = {
        "machine": describe(),
        "preset": None if arguments.engine_dir else arguments.preset,
        "max_batch_size": engine.limits.max_batch_size,
        "num_requests": num_requests,
        "one_after_another": alone,
        "together": together,
        "speedup": alone["seconds"] / together["seconds"],
        "mean_decode_batch": (after[0] - before[0]) / (after[1] - before[1]),
    }
    for label, row in (("1 client", alone), (f"{num_clients} clients", together)):
        first, per_token = row["first_token_ms"], row["per_token_ms"]
        print(
            f"{label:12} {row['requests_per_s']:6.1f} requests/s"
            f"   {row['tokens_per_s']:6.0f} tokens/s"
            f"   first token p50 {first['p50']:.0f} p95 {first['p95']:.0f} ms"
            f"   per token p50 {per_token['p50']:.1f} p95 {per_token['p95']:.1f} ms"
        )
    print(f"speedup {result['speedup']:.2f}, mean decode batch {result['mean_decode_batch']:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
