"""An interrupted conversion resumes where it stopped, to the same bytes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from build.conversion.convert import convert
from build.conversion.pipeline import Buffers
from build.sources.hugging_face import HuggingFaceSource
from nvlm.formats.manifest import verify_all
from tests.conftest import CPU, FP8
from tests.support.command import CONVERT, background, one_line_error, run_command, tree

UNITS = 1 + 2 + 1 + 1 + 2 + 1
"""The tiny model's: ViT embeddings, 2 layers, projector; decoder embedding, 2 layers, head."""


@pytest.fixture(scope="module")
def flags(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A conversion with an image, two ranks and FP8; of a tenth of a second."""
    folder = tmp_path_factory.mktemp("calibration")
    Image.new("RGB", (90, 60), "red").save(folder / "image.png")
    path = folder / "calibration.jsonl"
    path.write_text('{"prompt": "What is it?", "image": "image.png"}\n{"prompt": "Why?"}\n')
    data = ("--calib_data", path, "--tp_size", "2")
    return ("--model_dir", model_dir, "--device", "cpu", *data)


@pytest.fixture(scope="module")
def whole(flags: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an uninterrupted run makes."""
    place = tmp_path_factory.mktemp("whole") / "new"
    assert run_command(CONVERT, *flags, "--output_dir", place).exit_code == 0
    return tree(place)


def num_done(folder: Path) -> int:
    """Units in the journal of an interrupted run."""
    journal = folder / "new.partial" / ".journal"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def killed(flags: tuple[object, ...], folder: Path, kill_at: int) -> int:
    """Runs a conversion that kills itself before a change of the disk; its exit code."""
    watched = folder / "out"
    watched.mkdir(exist_ok=True)
    log = folder / "log"
    arguments = (*flags, "--output_dir", watched / "new")
    running = background(CONVERT, *arguments, log=log, watched=watched, kill_at=kill_at)
    return running.wait().exit_code


def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(
    flags: tuple[object, ...], whole: dict[str, str], tmp_path: Path
) -> None:
    """Each run resumes after the last; none does a finished unit again."""
    moments, place = random.Random(20), tmp_path / "out" / "new"
    done = num_kills = 0
    while num_kills < 10:
        code = killed(flags, tmp_path, moments.randint(8, 60))
        assert code in (-signal.SIGKILL, 0)
        if code == 0:
            assert tree(place) == whole
            shutil.rmtree(place)
            done = 0
            continue
        num_kills += 1
        assert num_done(place.parent) >= done, "a finished unit was lost"
        done = num_done(place.parent)
    assert run_command(CONVERT, *flags, "--output_dir", place).exit_code == 0
    assert tree(place) == whole
    assert [path.name for path in place.parent.iterdir()] == ["new"]


@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_one_rerun_ends_with_the_same_bytes(
    flags: tuple[object, ...],
    whole: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    step: int,
) -> None:
    place, kill_at, seen = tmp_path / "out" / "new", 1, set()
    while (code := killed(flags, tmp_path, kill_at)) != 0:
        assert code == -signal.SIGKILL
        done = num_done(place.parent)
        seen.add(done)
        caplog.clear()
        if not place.exists():  # else killed after the last rename: there is nothing to resume
            result = run_command(CONVERT, *flags, "--output_dir", place)
            assert result.exit_code == 0, result.stderr
        if 0 < done < UNITS:
            assert f"{done} of {UNITS} steps" in caplog.text
        assert tree(place) == whole, f"killed before change {kill_at}, with {done} units done"
        shutil.rmtree(place)
        kill_at += step
    assert len(seen) >= 4, f"killed only with {seen} units done"


@pytest.mark.parametrize(
    "other", [("--tp_size", "1"), ("--dtype", "float16"), ("--kv_cache_quant_algo", "none")]
)
def test_other_arguments_start_over_and_say_so(
    flags: tuple[object, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    other: tuple[str, ...],
) -> None:
    assert killed(flags, tmp_path, 60) == -signal.SIGKILL
    place = tmp_path / "out" / "new"
    assert num_done(place.parent) > 0
    result = run_command(CONVERT, *flags, *other, "--output_dir", place)
    assert result.exit_code == 0
    assert "is of other arguments, input or versions: starting over" in caplog.text
    assert "resuming" not in caplog.text
    clean = tmp_path / "clean"
    assert run_command(CONVERT, *flags, *other, "--output_dir", clean).exit_code == 0
    assert tree(place) == tree(clean)


def test_a_torn_line_of_the_journal_is_not_believed(
    flags: tuple[object, ...],
    whole: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a power cut: the line of the last unit is there in part."""
    assert killed(flags, tmp_path, 60) == -signal.SIGKILL
    place = tmp_path / "out" / "new"
    journal = place.parent / "new.partial" / ".journal"
    done = num_done(place.parent)
    with open(journal, "ab") as file:
        file.write(b'{"linears": [{"linear": "transf')
    result = run_command(CONVERT, *flags, "--output_dir", place)
    assert result.exit_code == 0
    assert f"{done} of {UNITS} steps" in caplog.text
    assert tree(place) == whole


def test_a_disk_too_full_to_resume_loses_nothing(
    flags: tuple[object, ...],
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert killed(flags, tmp_path, 60) == -signal.SIGKILL
    place = tmp_path / "out" / "new"
    done = num_done(place.parent)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        result = run_command(CONVERT, *flags, "--output_dir", place)
    one_line_error(result, "--output_dir", "free some space")
    assert num_done(place.parent) == done > 0
    assert run_command(CONVERT, *flags, "--output_dir", place).exit_code == 0
    assert tree(place) == whole


@pytest.mark.parametrize("buffers", [Buffers(0, 0), Buffers(200_000, 1000), Buffers(1000, 200_000)])
def test_what_waits_between_the_threads_changes_no_byte(
    model_dir: Path, checkpoint_dir: Path, tmp_path: Path, buffers: Buffers
) -> None:
    convert(HuggingFaceSource(model_dir), tmp_path / "new", FP8, CPU, buffers=buffers)
    found, expected = (
        verify_all(path, "checkpoint") for path in (tmp_path / "new", checkpoint_dir)
    )
    assert found.files == expected.files


def test_a_cached_calibration_gives_the_same_checkpoint_without_data(
    flags: tuple[object, ...], whole: dict[str, str], tmp_path: Path
) -> None:
    """Calibrate once, convert for other ranks at the speed of the disk."""
    first, again = tmp_path / "first", tmp_path / "again"
    assert run_command(CONVERT, *flags, "--output_dir", first).exit_code == 0
    cache = ("--calib_cache", first / "quantization_report.json")
    start = (*flags[:4], "--tp_size", "2", *cache)
    assert run_command(CONVERT, *start, "--output_dir", again).exit_code == 0
    found, expected = tree(again), dict(whole)
    for name in ("manifest.json", "quantization_report.html"):
        assert found.pop(name) != expected.pop(name), "other provenance"
    assert found == expected


def test_a_cached_calibration_of_other_weights_is_refused(
    flags: tuple[object, ...], tmp_path: Path
) -> None:
    first = tmp_path / "first"
    assert run_command(CONVERT, *flags, "--output_dir", first).exit_code == 0
    report = first / "quantization_report.json"
    values = json.loads(report.read_text())
    for row in values["linears"]:
        if row["linear"].endswith(("layers.1.mlp.fc", "layers.1.mlp.gate")):  # one scale for both
            row["weight_amax"] *= 1.5
            row["weights_scaling_factor"] *= 1.5
    report.write_text(json.dumps(values))
    start = (*flags[:4], "--calib_cache", report)
    result = run_command(CONVERT, *start, "--output_dir", tmp_path / "again")
    assert result.exit_code == 2
    assert "--calib_cache is of other weights" in result.error
    assert "transformer.layers.1.mlp." in result.error
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "again.partial").exists()
    report.write_text("{}")
    result = run_command(CONVERT, *start, "--output_dir", tmp_path / "again")
    assert "is no quantization report" in result.error
