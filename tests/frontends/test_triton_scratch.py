"""A killed server's folder and shared memory are removed at the next start; a live one's stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frontends.triton.scratch import remove_abandoned, scratch_folder
from tests.frontends.test_triton_dead_parts import serving
from tests.frontends.test_triton_start import running_in_group
from tests.support.command import ROOT

SHARED = Path("/dev/shm")

HOLDER = """
import sys, time
from frontends.triton.scratch import scratch_folder

with scratch_folder() as made:
    print(made.path, made.regions, flush=True)
    time.sleep(600)
"""


def folders(parent: Path) -> list[Path]:
    return list(parent.glob("nvlm_*"))


def test_a_folder_is_removed_when_its_owner_is_dead_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        name, regions = owner.stdout.readline().split()
        folder, region = Path(name), SHARED / f"{regions}0_x"
        region.write_bytes(b"x")
        with scratch_folder() as made:
            assert set(folders(tmp_path)) == {folder, made.path}
            assert region.exists()
        assert folders(tmp_path) == [folder]
    finally:
        owner.kill()
        owner.wait()
    with scratch_folder() as made:
        assert folders(tmp_path) == [made.path]
    assert folders(tmp_path) == []
    assert not region.exists()


def test_what_no_server_of_this_program_made_stays(tmp_path: Path) -> None:
    """A folder without a lock, a link, and shared memory of a name that a server does not give."""
    for name in ("nvlm_triton_other", "target", "nvlm_triton_odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "target" / "owner").touch()
    (tmp_path / "nvlm_triton_link").symlink_to(tmp_path / "target")
    region = SHARED / f"nvlm_odd_{os.getpid()}"
    region.write_bytes(b"x")
    (tmp_path / "nvlm_triton_odd" / "owner").write_text("nvlm_odd_")
    try:
        remove_abandoned(tmp_path)
        assert region.exists()
    finally:
        region.unlink()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"nvlm_triton_other", "nvlm_triton_link", "target"}
    assert (tmp_path / "target" / "owner").exists()


def test_a_killed_servers_folder_stays_while_tritonserver_lives(
    float32_engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its shared memory is nobody else's to read."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with serving(float32_engine_dir, tmp_path) as server:
        group = server.tritonserver
        regions = list(SHARED.glob(f"nvlm_{server.process.pid}_*"))
        assert regions
        assert {region.stat().st_mode & 0o077 for region in regions} == {0}
        try:
            os.killpg(group, signal.SIGSTOP)
            server.process.kill()
            server.process.wait()
            remove_abandoned(temporary)
            (folder,) = temporary.glob("nvlm_triton_*")
            assert (folder / "models").is_dir()
            assert all(region.exists() for region in regions)
        finally:
            os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + 60
    while running_in_group(group):
        assert time.monotonic() < end
        time.sleep(0.02)
    while folders(temporary):  # what was killed may hold the lock for a moment longer
        assert time.monotonic() < end
        remove_abandoned(temporary)
        time.sleep(0.02)
    assert not any(region.exists() for region in regions)
