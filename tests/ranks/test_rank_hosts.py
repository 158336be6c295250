"""Two ranks on two hosts: network namespaces with addresses and working folders of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner
from tests.conftest import FP32, Workshop
from tests.support.ranks import MPIRUN, PHOTO, PROGRAM, engine_of, finished, needs_mpi

pytestmark = [needs_mpi, pytest.mark.mpi]

ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True, slots=True)
class Hosts:
    """`launcher` takes the place of ssh."""

    first: str
    launcher: Path


def ip(*words: str) -> int:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if MPIRUN is None or not Path(MPIRUN).with_name("mpichversion").exists():
        pytest.skip("the launcher's flags are MPICH's, and mpirun is another's")
    names = [f"nvlm{os.getpid()}{side}" for side in "ab"]
    try:
        if shutil.which("ip") is None or any(ip("netns", "add", name) for name in names):
            pytest.skip("network namespaces cannot be made here (needs root and iproute2)")
        ip("link", "add", "va", "netns", names[0], "type", "veth", "peer", "name", "vb")
        ip("link", "set", "vb", "netns", names[1])
        for name, link, address in zip(names, ("va", "vb"), ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            if ip("-n", name, "link", "set", "lo", "up"):
                pytest.skip("network namespaces are here without interfaces")
        launcher = tmp_path / "launcher"
        launcher.write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nhost=$1; shift\n'
            f"case $host in {ADDRESSES[0]}) ns={names[0]};; *) ns={names[1]};; esac\n"
            'exec ip netns exec $ns /bin/sh -c "$*"\n'
        )
        launcher.chmod(0o755)
        yield Hosts(names[0], launcher)
    finally:
        for name in names:
            ip("netns", "del", name)


def test_two_hosts_with_folders_of_their_own_give_the_tokens_of_one(
    workshop: Workshop, hosts: Hosts, tmp_path: Path
) -> None:
    """The engine directory is at the same relative place, and is all that a worker needs; the
    picture is read on the first host only."""
    assert MPIRUN is not None
    words: list[object] = ["ip", "netns", "exec", hosts.first, MPIRUN, "-launcher", "ssh"]
    words += ["-launcher-exec", hosts.launcher, "-hosts", ",".join(ADDRESSES), "-ppn", 1]
    flags = ("--image", "photo.jpg", "--prompt", "hi", "--max_new_tokens", 8, "--json")
    for side in "ab":
        shutil.copytree(engine_of(workshop, 2, FP32), tmp_path / side / "engine")
        words += [":"] * (side == "b") + ["-n", 1, "-wdir", tmp_path / side]
        words += [sys.executable, PROGRAM, "", "--engine_dir", "engine", *flags]
    shutil.copy(PHOTO, tmp_path / "a" / "photo.jpg")
    result = finished([*map(str, words)], tmp_path)
    assert result.returncode == 0, result.stderr
    with Runner.open(engine_of(workshop, 1, FP32), torch.device("cpu")) as runner:
        expected = runner.generate(
            GenerationRequest.images_first("hi", (PHOTO,), max_new_tokens=8)
        ).token_ids
    assert json.loads(result.stdout)["token_ids"] == expected
