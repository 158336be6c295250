"""Tensor parallel ranks under a real `mpirun`, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nvlm import plan
from runtime.engine_dir import EngineDir
from runtime.mpi import World
from runtime.vision.parallel_executor import spread
from tests.conftest import FP8, FP32, Workshop
from tools.model_dir import Shape

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests" / "rank_program.py"
PHOTO = ROOT / "examples" / "coffee.jpg"
IMAGES = ROOT / "tests" / "data" / "images"
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
SHAPE = Shape(
    hidden_size=512,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    image_size=56,
)

needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no mpirun; pip install mpi4py mpich")


def mpirun(
    num_ranks: int, what: str, *flags: object, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    assert MPIRUN is not None
    return subprocess.run(
        [MPIRUN, "-n", str(num_ranks), sys.executable, str(PROGRAM), what, *map(str, flags)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def engine(workshop: Workshop) -> Callable[..., Path]:
    model = workshop.model("model_ranks", SHAPE)

    def make(tp_size: int, options: object = FP32) -> Path:
        name = f"ranks_{'float32' if options is FP32 else 'fp8'}_{tp_size}"
        chosen = replace(options, tp_size=tp_size)  # type: ignore[type-var]
        checkpoint = workshop.checkpoint(f"checkpoint_{name}", model, chosen)
        return workshop.engine(f"engine_{name}", checkpoint, vision="torch", max_num_images=3)

    return make


def requests(path: Path, count: int) -> Path:
    pictures = [[PHOTO], [IMAGES / "photo_36x36.png"], [IMAGES / "pixel_1x1.png", PHOTO], []]
    lines = [
        {
            "id": i,
            "prompt": f"Question {i}: what is this?",
            "images": [str(picture) for picture in pictures[i % 4]],
            "max_new_tokens": 8,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch(tp_size: int, engine_dir: Path, tmp_path: Path, count: int) -> list[list[int]]:
    """Token ids of every request; what ranks opened and hold lies in tmp_path/rank*.json."""
    output = tmp_path / f"answers_{tp_size}.jsonl"
    result = mpirun(
        tp_size,
        f"record={tmp_path}",
        *("--engine_dir", engine_dir, "--input_file", requests(tmp_path / "in.jsonl", count)),
        *("--output_file", output),
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["token_ids"] for line in output.read_text().splitlines()]


@needs_mpi
@pytest.mark.mpi
def test_every_tensor_parallel_size_gives_the_same_tokens_in_float32(
    engine: Callable[..., Path], tmp_path: Path
) -> None:
    answers = {tp: batch(tp, engine(tp), tmp_path, 8) for tp in (1, 2, 4)}
    assert len(answers[1]) == 8
    assert answers[2] == answers[1]
    assert answers[4] == answers[1]
    config = EngineDir.read(engine(4)).checkpoint_config
    for rank in range(4):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["files"] == ["config.json", f"rank{rank}.safetensors"]
        assert found["bytes"] <= plan.decoder_weight_bytes(config, rank)


@needs_mpi
@pytest.mark.mpi
def test_fp8_ranks_give_the_tokens_of_one(engine: Callable[..., Path], tmp_path: Path) -> None:
    one, two = (batch(tp, engine(tp, FP8), tmp_path, 40) for tp in (1, 2))
    equal = sum(a == b for a, b in zip(one, two, strict=True))
    assert equal >= 39, f"{equal} of 40"


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize("phase", ["load", "vision", "prefill", "decode"])
def test_a_killed_rank_ends_all_and_is_named_with_its_phase(
    engine: Callable[..., Path], phase: str
) -> None:
    flags = ("--engine_dir", engine(2), "--image", PHOTO, "--prompt", "hi")
    result = mpirun(2, f"kill={phase}", *flags)
    assert result.returncode != 0
    assert f"rank 1 died in phase {phase}" in result.stderr, result.stderr


@needs_mpi
@pytest.mark.mpi
def test_a_failed_rank_shows_its_traceback_and_phase(engine: Callable[..., Path]) -> None:
    result = mpirun(2, "raise=prefill", "--engine_dir", engine(2), "--prompt", "hi")
    assert result.returncode == 1
    assert "RuntimeError: the test's failure" in result.stderr, result.stderr
    assert "rank 1 failed in phase prefill" in result.stderr


@needs_mpi
@pytest.mark.mpi
@pytest.mark.parametrize(
    ("num_ranks", "what", "message"),
    [
        (3, "", "tp_size=2, pp_size=1 but 3 ranks are running; use mpirun -n 2"),
        (2, "version=9.9", "rank 1 has nvlm-engine 9.9, rank 0 has"),
    ],
)
def test_ranks_that_do_not_fit_are_told_once(
    engine: Callable[..., Path], num_ranks: int, what: str, message: str
) -> None:
    result = mpirun(num_ranks, what, "--engine_dir", engine(2), "--prompt", "hi")
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]


@needs_mpi
@pytest.mark.mpi
def test_sigterm_ends_every_rank(engine: Callable[..., Path], tmp_path: Path) -> None:
    assert MPIRUN is not None
    path = requests(tmp_path / "in.jsonl", 2000)
    output = tmp_path / "out.jsonl"
    flags = ("--engine_dir", engine(2), "--input_file", path, "--output_file", output)
    process = subprocess.Popen(
        [MPIRUN, "-n", "2", sys.executable, str(PROGRAM), "", *map(str, flags)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    _, stderr = process.communicate(timeout=10)
    assert process.returncode != 0
    assert "Traceback" not in stderr, stderr
    assert "died" not in stderr, stderr


def test_fewer_gpus_than_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    world = World(4, 3, 2, 1)
    with pytest.raises(Exception, match="2 ranks run on this machine and torch sees 1 GPUs"):
        world.device(torch.device("cuda"))


def test_tiles_are_spread_evenly() -> None:
    assert spread(7, 4) == [2, 2, 2, 1]
    assert spread(1, 2) == [1, 0]


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Path]:
    """Two network namespaces with addresses of their own, and a launcher in place of ssh."""
    names = [f"nvlm{os.getpid()}{side}" for side in "ab"]

    def ip(*words: str) -> int:
        return subprocess.run(["ip", *words], capture_output=True, check=False).returncode

    try:
        if shutil.which("ip") is None or any(ip("netns", "add", name) for name in names):
            pytest.skip("network namespaces cannot be made here (needs root and iproute2)")
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb")
        ip("link", "set", "vb", "netns", names[1])
        for name, link, address in zip(
            names, ("va", "vb"), ("10.77.0.1", "10.77.0.2"), strict=True
        ):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        launcher = tmp_path / "launcher"
        launcher.write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
            f"case $host in 10.77.0.1) ns={names[0]};; *) ns={names[1]};; esac\n"
            'exec ip netns exec $ns /bin/sh -c "$*"\n'
        )
        launcher.chmod(0o755)
        yield launcher
    finally:
        for name in names:
            ip("netns", "del", name)


@needs_mpi
@pytest.mark.mpi
def test_two_hosts_with_folders_of_their_own_give_the_tokens_of_one(
    engine: Callable[..., Path], hosts: Path, tmp_path: Path
) -> None:
    assert MPIRUN is not None
    flags = ["--image", PHOTO, "--prompt", "hi", "--max_new_tokens", "8", "--json"]
    one = mpirun(1, "", "--engine_dir", engine(1), *flags)
    command: list[object] = []
    for side in "ab":
        shutil.copytree(engine(2), tmp_path / side / "engine")
        program = (sys.executable, PROGRAM, "", "--engine_dir", "engine", *flags)
        command += [":"] * bool(command) + ["-n", 1, "-wdir", tmp_path / side, *program]
    namespace = hosts.read_text().partition("ns=")[2].partition(";")[0]
    start = ["ip", "netns", "exec", namespace, MPIRUN, "-launcher", "ssh", "-launcher-exec", hosts]
    two = subprocess.run(
        [*map(str, start), "-hosts", "10.77.0.1,10.77.0.2", "-ppn", "1", *map(str, command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=60,
        check=False,
    )
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["token_ids"] == json.loads(one.stdout)["token_ids"]
