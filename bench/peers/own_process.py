"""Runs one part of a measurement in a process of its own, with a time limit.

A reader's engine holds the GPU's memory until its process ends, and may leave processes of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# Without a network, and without packages that vLLM takes where they are.
VLLM_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "NCCL_SOCKET_IFNAME": "lo",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_LAST_LINES, _LINE_LENGTH = 12, 240
_ERRORS = ("Error", "error", "Exception", "No module", "out of memory")


def run_alone(arguments: list[str], seconds: float, log: Path) -> str | None:
    """Runs `python arguments` with its output in `log`; returns what its errors were, or None.

    All processes that it started end with it, also where this process is ended by SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**VLLM_ENVIRONMENT, **os.environ},
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return None
    how = f"not done after {seconds:g} s" if code is None else f"ended with {code}"
    return f"{how}\n{_errors_of(log)}"


def _errors_of(log: Path) -> str:
    """The lines that name errors, and the last ones."""
    lines = [line[:_LINE_LENGTH] for line in log.read_text(errors="replace").splitlines() if line]
    earlier = [line for line in lines[:-_LAST_LINES] if any(word in line for word in _ERRORS)]
    return "\n".join(earlier[-_LAST_LINES:] + lines[-_LAST_LINES:])
