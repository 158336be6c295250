"""A real tritonserver for tests, started as a user starts it, and clients that talk to it."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from tests.support.command import ROOT
from tests.support.metrics import samples_at

_SHARED = Path("/dev/shm")
START_TIMEOUT_S = 150
ANSWER_TIMEOUT_S = 120


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers. `errors` are codes and sentences as a client sees them."""

    process: subprocess.Popen[str]
    http: int
    grpc: int
    metrics: int
    log: Path

    def generate(self, model: str = "nvlm", **fields: Any) -> dict[str, Any]:
        """HTTP generate; an error is {"error": sentence, "status": HTTP status}."""
        data = json.dumps(fields).encode()
        url = f"http://127.0.0.1:{self.http}/v2/models/{model}/generate"
        try:
            with urllib.request.urlopen(url, data, timeout=ANSWER_TIMEOUT_S) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            return {**json.load(error), "status": error.code}

    def samples(self) -> dict[str, float]:
        """Our metrics by series."""
        return samples_at(f"http://127.0.0.1:{self.metrics}/metrics")

    def wait_for_sample(self, name: str, value: float, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.samples().get(name, 0.0) != value:
            assert time.monotonic() < deadline, f"{name} is not {value}: {self.samples()}"
            time.sleep(0.05)

    def memory_bytes(self) -> int:
        """Resident memory of the server and its Python backends."""
        found = {self.process.pid}
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(stat.parent.name)] = int(fields[1])
        for _ in range(5):
            found |= {pid for pid, parent in parents.items() if parent in found}
        total = 0
        for pid in found:
            statm = Path(f"/proc/{pid}/statm")
            total += int(statm.read_text().split()[1]) if statm.exists() else 0
        return total * os.sysconf("SC_PAGE_SIZE")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(
    engine_dir: Path,
    log: Path,
    *flags: object,
    python: Path = Path(sys.executable),
    cwd: Path = ROOT,
) -> tuple[subprocess.Popen[str], list[int]]:
    """A running `python -m frontends.triton.serve`, its stderr in `log`."""
    ports = free_ports(3)
    names = ("--http_port", "--grpc_port", "--metrics_port")
    port_flags = [str(x) for pair in zip(names, ports, strict=True) for x in pair]
    command = [str(python), "-m", "frontends.triton.serve", "--engine_dir", str(engine_dir)]
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--num_threads", "1", *port_flags, *map(str, flags)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
        )
    return process, ports


@contextmanager
def serving(engine_dir: Path, folder: Path, *flags: object) -> Iterator[Served]:
    """A server that has answered; ended as by Control-C, after which nothing of it may be left."""
    log = folder / "serve.log"
    before = set(_SHARED.glob("nvlm_*"))  # of a killed one, whose number comes again in a namespace
    process, ports = start(engine_dir, log, *flags)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (ready := re.search(r"^ready: .*; log (\S+);", log.read_text(), re.MULTILINE)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Served(process, *ports, Path(ready[1]))
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 130, log.read_text()
    assert log.read_text().splitlines()[-1] == "interrupted"
    assert not Path(ready[1]).exists(), "the scratch directory is left"
    left = set(_SHARED.glob(f"nvlm_{process.pid}_*")) - before
    assert not left, "shared memory is left"


def tensor(name: str, array: NDArray[Any]) -> grpcclient.InferInput:
    """An input with the type its array has."""
    made = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    return made.set_data_from_numpy(array)


def tensors(text: str | bytes, max_tokens: int, **more: Any) -> list[grpcclient.InferInput]:
    """A question as tensors; values get the types of the signature and a batch dimension."""
    text = text.encode() if isinstance(text, str) else text
    arrays = {
        "text_input": np.array([[text]], np.object_),
        "max_tokens": np.array([[max_tokens]], np.int32),
    }
    for name, value in more.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        elif isinstance(value, (bytes, str, list)):
            values = value if isinstance(value, list) else [value]
            arrays[name] = np.array([values], np.object_)
        else:
            dtype = {bool: np.bool_, float: np.float32, int: np.int32}[type(value)]
            arrays[name] = np.array([[value]], np.uint64 if name == "seed" else dtype)
    return [tensor(name, array) for name, array in arrays.items()]


@dataclass(slots=True)
class Streamed:
    """What came of one request: pieces of text, or an error; times by time.perf_counter."""

    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    sent: float = field(default_factory=time.perf_counter)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Stream:
    """A gRPC stream that many requests may share; answers come by request id."""

    def __init__(self, served: Served) -> None:
        self.client = grpcclient.InferenceServerClient(f"127.0.0.1:{served.grpc}")
        self._queue: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self._queue.put((result, error)))
        self.answers: dict[str, Streamed] = {}
        self._open: set[str] = set()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream(cancel_requests=bool(self._open))
        self.client.close()

    def send(
        self,
        name: str,
        inputs: list[grpcclient.InferInput],
        model: str = "nvlm",
        parameters: dict[str, Any] | None = None,
    ) -> None:
        self.answers[name] = Streamed()
        self._open.add(name)
        self.client.async_stream_infer(
            model,
            inputs,
            request_id=name,
            enable_empty_final_response=True,
            parameters=parameters,
        )

    def take(self) -> str:
        """Waits for the next response and returns whose it is. An error has no id, so only a
        stream with one open request may ask for one."""
        result, error = self._queue.get(timeout=ANSWER_TIMEOUT_S)
        if error is not None:
            (name,) = self._open
            self.answers[name].error = str(error)
            self._open.discard(name)
            return name
        response = result.get_response()
        answer = self.answers[response.id]
        for output in response.outputs:
            answer.outputs[output.name] = result.as_numpy(output.name).reshape(-1)[0]
        if response.outputs:
            answer.pieces.append(answer.outputs["text_output"].decode())
            answer.times.append(time.perf_counter())
        if response.parameters["triton_final_response"].bool_param:
            self._open.discard(response.id)
        return str(response.id)

    def finish(self) -> None:
        while self._open:
            self.take()


def ask(served: Served, inputs: list[grpcclient.InferInput], model: str = "nvlm") -> Streamed:
    """One request over gRPC streaming."""
    with Stream(served) as stream:
        stream.send("one", inputs, model)
        stream.finish()
        return stream.answers["one"]
