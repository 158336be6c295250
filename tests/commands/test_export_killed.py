"""Exports that are killed or run out of disk: nothing looks finished, and the same command ends
with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.command import CONVERT, background, one_line_error, run_command, tree
from tests.support.disks import Mount

Flags = tuple[object, ...]


@pytest.fixture(params=["model", "checkpoint"])
def flags(
    request: pytest.FixtureRequest, model_dir: Path, checkpoint_dir: Path, tmp_path: Path
) -> Flags:
    chosen = ("--output_format", "compressed-tensors")
    if request.param == "checkpoint":
        return ("--checkpoint_dir", checkpoint_dir, "--vision_quant_algo", "FP8", *chosen)
    path = tmp_path / "calibration.jsonl"
    path.write_text('{"prompt": "How many shapes are there?"}\n')
    return ("--model_dir", model_dir, "--calib_data", path, "--device", "cpu", *chosen)


def test_killed_at_random_moments_it_ends_with_the_same_bytes(flags: Flags, tmp_path: Path) -> None:
    place, watched = tmp_path / "out" / "new", tmp_path / "out"
    watched.mkdir()
    arguments = (*flags, "--output_dir", place)
    assert run_command(CONVERT, *arguments).exit_code == 0
    whole = tree(place)
    shutil.rmtree(place)
    moments, num_kills, resumed = random.Random(24), 0, False
    while num_kills < 6:
        kill_at = moments.randint(8, 60)
        log = tmp_path / "log"
        running = background(CONVERT, *arguments, log=log, watched=watched, kill_at=kill_at)
        result = running.wait()
        assert result.exit_code in (-signal.SIGKILL, 0)
        resumed |= "resuming after" in result.stderr
        if result.exit_code == 0:
            assert tree(place) == whole
            shutil.rmtree(place)
            continue
        num_kills += 1
        assert not place.exists()
    assert run_command(CONVERT, *arguments).exit_code == 0
    assert tree(place) == whole
    assert [path.name for path in watched.iterdir()] == ["new"]
    assert resumed, "no run resumed where another stopped"


def test_a_disk_that_fills_up_is_reported_and_room_fixes_it(
    flags: Flags, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("size=100m")
    arguments = (*flags, "--output_dir", disk / "new")
    assert run_command(CONVERT, *arguments).exit_code == 0
    whole = tree(disk / "new")
    total = sum(path.stat().st_size for path in (disk / "new").iterdir())
    shutil.rmtree(disk / "new")
    free = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    for part in (0.02, 0.5, 0.99):
        resize = ["mount", "-o", f"remount,size={int(part * total)}", str(disk)]
        subprocess.run(resize, check=True)
        result = run_command(CONVERT, *arguments)
        one_line_error(result, "disk", "full", "free some space")
        assert not (disk / "new").exists()
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert run_command(CONVERT, *arguments).exit_code == 0
        assert tree(disk / "new") == whole
        shutil.rmtree(disk / "new")
