"""A real serve.py for tests, started as a user starts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.command import ROOT
from tests.support.metrics import samples_at

START_TIMEOUT_S = 120
_READY = re.compile(r"^ready: http://127\.0\.0\.1:(\d+)/v1 ", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Served:
    process: subprocess.Popen[str]
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, **fields: Any) -> dict[str, Any]:
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return dict(json.load(response))

    def health(self) -> int | None:
        """The status of /health; None where nobody listens."""
        try:
            return int(urllib.request.urlopen(f"{self.url}/health", timeout=10).status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def samples(self) -> dict[str, float]:
        return samples_at(f"{self.url}/metrics")

    def wait_for_sample(self, name: str, value: float, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.samples().get(name, 0.0) != value:
            assert time.monotonic() < deadline, f"{name} is not {value}: {self.samples()}"
            time.sleep(0.02)


def wait_until_ready(process: subprocess.Popen[str], log: Path) -> Served:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (ready := _READY.search(log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return Served(process, log, int(ready[1]))


@contextmanager
def serving(
    engine_dir: Path,
    folder: Path,
    *flags: object,
    cwd: Path = ROOT,
    code: int = 0,
    is_killed: bool = False,
) -> Iterator[Served]:
    """A server on a free port, which is asked to stop in the end, unless the test has done so.

    code: what it ends with; other than 0, it ends by itself. is_killed: a part of it dies, whose
    traceback is in the log."""
    log = folder / "serve.log"
    command = [sys.executable, str(cwd / "serve.py"), "--engine_dir", str(engine_dir)]
    given = ("--device", "cpu", "--port", "0", *flags)
    with open(log, "w") as stderr:
        process = subprocess.Popen(
            [*command, *map(str, given)],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield wait_until_ready(process, log)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if code == 0 and process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code, log.read_text()
    assert code or is_killed or "Traceback" not in log.read_text(), log.read_text()
