"""A small Ray cluster of this process, and our application on it, started as a user starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from tests.support.command import ROOT
from tests.support.metrics import samples_at

_OBJECT_STORE_BYTES = 100 << 20
_START_TIMEOUT_S = 200


@contextmanager
def cluster(num_cpus: int) -> Iterator[str]:
    """Its address."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(
        "local",
        num_cpus=num_cpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": environment},
    )
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Application:
    address: str
    port: int
    engine_dir: Path

    def command(self, *flags: object) -> list[str]:
        own = ["--engine_dir", str(self.engine_dir), "--device", "cpu"]
        where = ["--address", self.address, "--port", str(self.port)]
        return [sys.executable, "-m", "frontends.ray_serve", *own, *where, *map(str, flags)]

    def deploy(self, *flags: object) -> subprocess.CompletedProcess[str]:
        """Again, it replaces what runs."""
        return subprocess.run(
            self.command(*flags),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def by_replica(self, name: str) -> dict[str, float]:
        """A metric without further labels, by the replica's name."""
        start = f'{name}{{replica="'
        samples = samples_at(f"{self.url}/metrics")
        return {
            series.removeprefix(start).removesuffix('"}'): value
            for series, value in samples.items()
            if series.startswith(start)
        }

    def replica_pids(self) -> list[int]:
        """Finds the actors: the parents of the parents of the servers of this engine."""
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"frontends.ray_serve.tied" in words and str(self.engine_dir).encode() in words:
                found.add(
                    int(path.parent.joinpath("stat").read_text().rpartition(")")[2].split()[1])
                )
        return sorted(found)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
