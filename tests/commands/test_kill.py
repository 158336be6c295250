"""Killed, interrupted, out of disk: what is left never looks finished, and a rerun fixes it.

Commands run as processes of their own that the test kills; full disks are real, small ones.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvlm.formats import manifest
from tests.support.asking import ask
from tests.support.command import (
    BUILD,
    CONVERT,
    ROOT,
    RUN,
    Background,
    background,
    one_line_error,
    run_command,
    run_process,
    tree,
)
from tests.support.disks import Mount

COMMANDS = (CONVERT, BUILD)


@dataclass(frozen=True, slots=True)
class Making:
    """A command that makes `place`, and what an uninterrupted run of it made."""

    name: str
    arguments: tuple[object, ...]
    kind: manifest.Kind
    whole: dict[str, str]
    place: Path

    @property
    def staging(self) -> Path:
        return self.place.with_name(self.place.name + ".partial")

    def start(
        self, *flags: object, kill_at: int = 0, kill_with: int = signal.SIGKILL
    ) -> Background:
        return background(
            self.name,
            *self.arguments,
            *flags,
            log=self.place.parent.with_suffix(".log"),
            watched=self.place.parent,
            kill_at=kill_at,
            kill_with=kill_with,
        )

    def run(self, *flags: object) -> int:
        return run_command(self.name, *self.arguments, *flags).exit_code

    def num_changes(self) -> int:
        """How often an uninterrupted run changes the file system; leaves nothing."""
        assert self.start().wait().exit_code == 0
        log = self.place.parent.with_suffix(".log.count")
        shutil.rmtree(self.place)
        return int(log.read_text())

    def forget(self) -> None:
        """So that the next run starts from nothing, not where the last one stopped."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def assert_absent_or_whole(self) -> None:
        if self.place.exists():
            manifest.verify_all(self.place, self.kind)
            assert tree(self.place) == self.whole

    def assert_rerun_fixes(self, *flags: object) -> None:
        """The same command again: whole, byte by byte, with nothing beside it."""
        if flags or not self.place.exists():
            assert self.run(*flags) == 0
        assert tree(self.place) == self.whole
        assert [path.name for path in self.place.parent.iterdir()] == [self.place.name]


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    """One short question, so that a calibrated conversion takes a tenth of a second."""
    path = tmp_path / "calibration.jsonl"
    path.write_text('{"prompt": "How many shapes are there?"}\n')
    return path


@pytest.fixture
def making(model_dir: Path, checkpoint_dir: Path, calibration: Path) -> Callable[..., Making]:
    """Either command, making `folder / "new"`; `folder` holds nothing else."""

    def make(name: str, folder: Path) -> Making:
        folder.mkdir(exist_ok=True)
        place = folder / "new"
        start: tuple[object, ...]
        if name == CONVERT:
            kind: manifest.Kind = "checkpoint"
            start = ("--model_dir", model_dir, "--calib_data", calibration, "--device", "cpu")
            start = (*start, "--output_dir", place)
        else:
            kind = "engine"
            start = ("--checkpoint_dir", checkpoint_dir, "--vision", "torch", "--engine_dir", place)
        result = Making(name, start, kind, {}, place)
        assert result.run() == 0
        whole = tree(place)
        shutil.rmtree(place)
        return Making(name, start, kind, whole, place)

    return make


# --- kill -9 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_a_change_of_the_disk_leaves_nothing_that_looks_finished(
    making: Callable[..., Making], tmp_path: Path, name: str, step: int
) -> None:
    """Moments at which a file or directory is about to be made, written, synced or renamed: every
    `step`th of the work and each of the last ones. A build finds what the one before it left; a
    conversion starts from nothing, as it would resume (test_resume) and never see the same moment.
    """
    making_ = making(name, tmp_path / "out")
    total = making_.num_changes()
    assert total > 15, f"{total} changes: the run is not watched"
    kill_at, code = 1, -1
    while code != 0:
        if name == CONVERT:
            making_.forget()
        code = making_.start(kill_at=kill_at).wait().exit_code
        assert code in (-signal.SIGKILL, 0)
        making_.assert_absent_or_whole()
        if making_.place.exists() and code:  # killed after the last rename
            shutil.rmtree(making_.place)
        last = total - 8
        kill_at = min(kill_at + step, last) if kill_at < last else kill_at + 1
    assert kill_at > total
    making_.assert_rerun_fixes()


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_while_overwriting_loses_neither_the_old_nor_looks_finished(
    making: Callable[..., Making], tmp_path: Path, name: str
) -> None:
    """A whole directory, the old or the new, is there at every moment, if under another name."""
    making_ = making(name, tmp_path / "out")
    kill_at, code = making_.num_changes() - 4, -1  # up to here it is like making a new one
    while code != 0:
        if not making_.place.exists():
            assert making_.run() == 0
        making_.forget()
        code = making_.start("--overwrite", kill_at=kill_at).wait().exit_code
        assert code in (-signal.SIGKILL, 0)
        making_.assert_absent_or_whole()
        assert any(is_whole(path, making_.kind) for path in making_.place.parent.iterdir())
        kill_at += 1
    making_.assert_rerun_fixes("--overwrite")


def is_whole(directory: Path, kind: manifest.Kind) -> bool:
    try:
        manifest.verify_all(directory, kind)
    except Exception:
        return False
    return True


# What appears in the staging directory, in this order.
MOMENTS = {
    CONVERT: ("vision/model.safetensors", "rank0.safetensors", "manifest.json.tmp"),
    BUILD: ("vision/model.safetensors", "llm/rank0.safetensors", "manifest.json.tmp"),
}


def wait_for(path: Path, running: Background, timeout_s: float = 60.0) -> None:
    """Returns as soon as `path` is there, or the process has ended."""
    end = time.monotonic() + timeout_s
    while not path.exists() and running.process.exitcode is None:
        assert time.monotonic() < end, f"{path} never appeared"


@pytest.mark.parametrize(
    ("name", "moment"), [(name, moment) for name in COMMANDS for moment in MOMENTS[name]]
)
def test_killed_from_outside_at_a_moment_of_the_work(
    making: Callable[..., Making], tmp_path: Path, name: str, moment: str
) -> None:
    making_ = making(name, tmp_path / "out")
    running = making_.start()
    wait_for(making_.staging / moment, running)
    running.kill(signal.SIGKILL)
    assert running.wait().exit_code in (-signal.SIGKILL, 0)
    making_.assert_absent_or_whole()
    making_.assert_rerun_fixes()


@pytest.mark.parametrize("name", [CONVERT, pytest.param(BUILD, marks=pytest.mark.slow)])
def test_a_real_process_killed_at_work(
    making: Callable[..., Making], tmp_path: Path, name: str
) -> None:
    """`python <name>.py` in a session of its own, killed when its first weights appear."""
    making_ = making(name, tmp_path / "out")
    kill_real_process(making_, MOMENTS[name][0], 0.0)
    making_.assert_absent_or_whole()
    making_.assert_rerun_fixes()


def kill_real_process(making_: Making, moment: str, delay_s: float) -> int:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / f"{making_.name}.py"), *map(str, making_.arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        end = time.monotonic() + 60
        while not (making_.staging / moment).exists() and process.poll() is None:
            assert time.monotonic() < end, f"{moment} never appeared"
        time.sleep(delay_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("delay_ms", [0, 2, 5, 10, 20, 40, 80, 160])
def test_a_real_process_killed_some_time_into_its_work(
    making: Callable[..., Making], tmp_path: Path, name: str, delay_ms: int
) -> None:
    making_ = making(name, tmp_path / "out")
    kill_real_process(making_, "vision", delay_ms / 1e3)
    making_.assert_absent_or_whole()
    making_.assert_rerun_fixes()


def assert_refused_as_unfinished(name: str, directory: Path, folder: Path) -> None:
    if name == CONVERT:
        flags = ("--checkpoint_dir", directory, "--engine_dir", folder / "engine")
        result = run_command(BUILD, *flags)
    else:
        result = run_command(RUN, *ask(directory, "--prompt", "hi"))
    one_line_error(result, str(directory), "no manifest.json", "not a finished")


def test_a_killed_directory_renamed_by_hand_is_refused(
    making: Callable[..., Making], tmp_path: Path, engine_dir: Path
) -> None:
    """`mv new.partial new` after a crash makes nothing finished."""
    for name in COMMANDS:
        making_ = making(name, tmp_path / name)
        running = making_.start(kill_at=making_.num_changes() - 6)
        assert running.wait().exit_code == -signal.SIGKILL
        assert (making_.staging / "vision" / "model.safetensors").is_file()
        assert not (making_.staging / "manifest.json").exists()
        assert_refused_as_unfinished(name, making_.staging, tmp_path)
        making_.staging.rename(making_.place)
        assert_refused_as_unfinished(name, making_.place, tmp_path)
    assert not (tmp_path / "engine").exists()


def wait_until_stopped(running: Background) -> None:
    end = time.monotonic() + 60
    status = Path(f"/proc/{running.process.pid}/stat")
    while status.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end, "it never stopped"
        time.sleep(0.001)


@pytest.mark.parametrize("name", COMMANDS)
def test_two_runs_for_one_place_do_not_mix(
    making: Callable[..., Making], tmp_path: Path, name: str
) -> None:
    """The second is refused while the first is at work, and the first continues unharmed."""
    making_ = making(name, tmp_path / "out")
    running = making_.start(kill_at=making_.num_changes() // 2, kill_with=signal.SIGSTOP)
    wait_until_stopped(running)
    try:
        result = run_command(name, *making_.arguments)
    finally:
        running.kill(signal.SIGCONT)
    one_line_error(result, "another process", "new.partial")
    assert running.wait().exit_code == 0
    making_.assert_rerun_fixes()


# --- signals that can be caught ----------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_command_cleans_up(
    making: Callable[..., Making], tmp_path: Path, name: str, signal_number: signal.Signals
) -> None:
    """Control-C, what a scheduler or `docker stop` sends, a closed terminal: nothing half-made is
    left, but what a conversion has done, and it says so."""
    making_ = making(name, tmp_path / "out")
    kill_at = making_.num_changes() - 6  # what a conversion has done is in its journal by then
    result = making_.start(kill_at=kill_at, kill_with=signal_number).wait()
    assert result.exit_code not in (0, -signal_number), "ignored, or ended without cleaning up"
    assert "Traceback" not in result.stderr
    if name == CONVERT:
        assert "new.partial keeps what is done; the same command resumes with it" in result.stderr
        assert list(making_.place.parent.iterdir()) == [making_.staging]
    else:
        assert list(making_.place.parent.iterdir()) == []
    making_.assert_rerun_fixes()


# --- a full disk -------------------------------------------------------------------------------


def full_disk_error(name: str, arguments: tuple[object, ...], disk: Path) -> None:
    """Told in one line; nothing is left, or what a conversion has done so far, which says so."""
    flag = "--output_dir" if name == CONVERT else "--engine_dir"
    place = disk / "new"
    result = run_command(name, *arguments, flag, place)
    one_line_error(result, f"{flag} {place}", "disk", "free some space or choose another disk")
    if name == BUILD or list(disk.iterdir()):
        left = [str(path.relative_to(disk)) for path in disk.glob("*/.journal")]
        assert left == (["new.partial/.journal"] if name == CONVERT else [])
        assert len(list(disk.iterdir())) == len(left)


def test_a_disk_too_small_is_reported_before_any_work(model_dir: Path, mount: Mount) -> None:
    disk = mount("size=300k")
    start = ("--model_dir", model_dir, "--device", "cpu")
    result = run_command(CONVERT, *start, "--output_dir", disk / "new")
    one_line_error(result, "--output_dir", "needs 70.0 MB but its disk has 0.3 MB free")
    assert "layers" not in result.stderr, "no progress bar has begun"
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_during_conversion_is_reported(
    model_dir: Path, calibration: Path, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone else takes the space that was free at the start: every step meets a full disk."""
    start = ("--model_dir", model_dir, "--calib_data", calibration, "--device", "cpu")
    room = mount("size=100m") / "new"
    assert run_command(CONVERT, *start, "--output_dir", room).exit_code == 0
    total = sum(path.stat().st_size for path in room.rglob("*") if path.is_file())
    free = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    for part in (0.01, 0.03, 0.1, 0.4, 0.6, 0.9, 0.99, 1.01):
        disk = mount(f"size={int(part * total)}")
        full_disk_error(CONVERT, start, disk)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert run_command(CONVERT, *start, "--output_dir", disk / "new").exit_code == 0
        assert tree(disk / "new") == tree(room)


def test_a_disk_without_room_for_file_names_is_reported_during_conversion(
    model_dir: Path, calibration: Path, mount: Mount
) -> None:
    """Enough bytes, too few inodes: each file in turn is the one too many."""
    start = ("--model_dir", model_dir, "--calib_data", calibration, "--device", "cpu")
    codes = []
    for inodes in range(2, 20):
        disk = mount(f"size=100m,nr_inodes={inodes}")
        if run_command(CONVERT, *start, "--output_dir", disk / "new").exit_code == 0:
            assert manifest.verify_all(disk / "new", "checkpoint")
            break
        full_disk_error(CONVERT, start, disk)
        codes.append(inodes)
    assert len(codes) > 8, "staging, three folders and eight files"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """As `ulimit -f` or a file system of small files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_larger_than_may_be_is_reported(
    model_dir: Path, checkpoint_dir: Path, tmp_path: Path, name: str
) -> None:
    converts = (CONVERT, "--model_dir", model_dir, "--quant_algo", "none", "--output_dir")
    builds = (BUILD, "--checkpoint_dir", checkpoint_dir, "--vision", "torch", "--engine_dir")
    arguments = (*(converts if name == CONVERT else builds), tmp_path / "out" / "new")
    for kilobytes in (0, 1, 10):
        with file_size_limit(kilobytes << 10):
            result = run_command(*arguments)
        one_line_error(result, str(arguments[-2]), "larger than", "ulimit -f", "another disk")
        assert list((tmp_path / "out").iterdir()) == []
    assert run_command(*arguments).exit_code == 0


@pytest.mark.parametrize("options", ["size={}k", "size=100m,nr_inodes={}"])
def test_a_full_disk_is_reported_during_the_build(
    checkpoint_dir: Path, mount: Mount, options: str
) -> None:
    start = ("--checkpoint_dir", checkpoint_dir, "--vision", "torch")
    sizes = range(2, 20) if "nr_inodes" in options else range(4, 1600, 60)
    num_refused = 0
    for size in sizes:
        disk = mount(options.format(size))
        result = run_command(BUILD, *start, "--engine_dir", disk / "new")
        if result.exit_code == 0:
            manifest.verify_all(disk / "new", "engine")
            break
        full_disk_error(BUILD, start, disk)
        num_refused += 1
    assert num_refused > 8, "as many steps write something"


@pytest.mark.slow
def test_a_full_disk_is_reported_during_the_onnx_export(checkpoint_dir: Path, mount: Mount) -> None:
    start = ("--checkpoint_dir", checkpoint_dir, "--vision", "onnxruntime")
    for kilobytes in (8, 100, 1000, 1500):
        full_disk_error(BUILD, start, mount(f"size={kilobytes}k"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_read_only_disk_is_reported(
    model_dir: Path, checkpoint_dir: Path, mount: Mount, name: str
) -> None:
    disk = mount("size=300k,ro")
    flag = "--output_dir" if name == CONVERT else "--engine_dir"
    source = ("--model_dir", model_dir) if name == CONVERT else ("--checkpoint_dir", checkpoint_dir)
    result = run_command(name, *source, flag, disk / "new")
    one_line_error(result, flag, "cannot be written", "Read-only file system")


def test_a_full_disk_is_reported_for_the_answers_of_a_batch(
    engine_dir: Path, tmp_path: Path, mount: Mount
) -> None:
    """What was answered stays, whole lines only count, and a rerun resumes from there."""
    lines = [{"id": i, "prompt": "hi"} for i in range(40)]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    disk = mount("size=8k")
    flags = ask(engine_dir, "--input_file", tmp_path / "in", "--output_file", disk / "out")
    result = run_command(RUN, *flags)
    one_line_error(result, "--output_file", "full", "disk")
    whole = (disk / "out").read_bytes().rpartition(b"\n")[0].splitlines()
    assert 0 < len(whole) < 40
    assert [json.loads(line)["id"] for line in whole] == list(range(len(whole)))
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    assert run_command(RUN, *flags).exit_code == 0
    answers = [json.loads(line) for line in (disk / "out").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == list(range(40))
    assert all("text" in answer for answer in answers)


def test_a_full_disk_that_stdout_goes_to_is_reported(engine_dir: Path) -> None:
    """`run.py ... > answer.txt`: an answer that was not written is no success."""
    with open("/dev/full", "w") as full:
        result = run_process(RUN, *ask(engine_dir, "--prompt", "hi"), stdout=full.fileno())
    one_line_error(result, "stdout")
