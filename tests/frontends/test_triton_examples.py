"""The clients in examples/, run as a reader of the documentation runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.support.cases import PHOTO
from tests.support.command import ROOT
from tests.support.triton_server import Served


@pytest.fixture(scope="module")
def runner(float32_engine_dir: Path) -> Runner:
    return Runner.open(float32_engine_dir, torch.device("cpu"))


def stdout_of(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


def test_grpc_streaming(triton_server: Served, runner: Runner) -> None:
    url = f"127.0.0.1:{triton_server.grpc}"
    flags = ("--url", url, "--image", PHOTO, "--prompt", "What is it?", "--max_tokens", 12)
    found = stdout_of(sys.executable, "examples/triton_grpc_stream.py", *flags)
    request = GenerationRequest.images_first("What is it?", (PHOTO,), max_new_tokens=12)
    assert found == runner.generate(request).text + "\n"


def test_an_error_is_reported_by_the_grpc_client(triton_server: Served) -> None:
    url = f"127.0.0.1:{triton_server.grpc}"
    done = subprocess.run(
        [sys.executable, "examples/triton_grpc_stream.py", "--url", url, "--prompt", ""],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.decode().startswith("error: text_input is empty")


def test_asyncio(triton_server: Served, runner: Runner) -> None:
    prompts = ["What is 1 + 1?", "What is 2 + 2?", "Why?"]
    url = f"127.0.0.1:{triton_server.grpc}"
    flags = ("--url", url, "--max_tokens", 12, "--prompt", *prompts)
    found = stdout_of(sys.executable, "examples/triton_asyncio.py", *flags)
    for prompt in prompts:
        result = runner.generate(GenerationRequest((prompt,), max_new_tokens=12))
        assert f"{prompt} -> {result.text} ({result.num_tokens} tokens)\n" in found


def test_a_large_picture_by_curl_is_answered(triton_server: Served, tmp_path: Path) -> None:
    """15 MB of JSON, with the header that the manual shows."""
    noise = torch.randint(0, 256, (1600, 2400, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)
    url = f"http://127.0.0.1:{triton_server.http}"
    found = stdout_of("examples/triton_curl.sh", url, tmp_path / "noise.png", "What is it?")
    assert json.loads(found.partition("\n")[0])["num_tiles"] == 7


def test_curl(triton_server: Served, runner: Runner) -> None:
    url = f"http://127.0.0.1:{triton_server.http}"
    found = stdout_of("examples/triton_curl.sh", url, PHOTO, "What's in the cup?")
    request = GenerationRequest.images_first("What's in the cup?", (PHOTO,), max_new_tokens=16)
    expected = runner.generate(request).text
    whole, *events = [line for line in found.split("\n") if line]
    assert json.loads(whole)["text_output"] == expected
    pieces = [json.loads(event.removeprefix("data: "))["text_output"] for event in events]
    assert len(pieces) > 1
    assert "".join(pieces) == expected
