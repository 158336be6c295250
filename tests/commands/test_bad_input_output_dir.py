"""Output directories of both commands that make one: what exists is never lost."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvlm.program import json_files
from tests.support.command import (
    BUILD,
    CONVERT,
    PLAIN,
    Result,
    one_line_error,
    refused,
    run_command,
    tree,
)
from tests.support.locks import LocksFail


@pytest.fixture(params=[CONVERT, BUILD])
def make(
    request: pytest.FixtureRequest, model_dir: Path, checkpoint_dir: Path
) -> Callable[[object], list[object]]:
    """Arguments of a command that makes a directory, for a given place."""
    if request.param == CONVERT:
        return lambda path: [CONVERT, "--model_dir", model_dir, "--output_dir", path, *PLAIN]
    start = (BUILD, "--checkpoint_dir", checkpoint_dir)
    return lambda path: [*start, "--engine_dir", path, "--vision", "torch"]


Make = Callable[[object], list[object]]


def flag_of(arguments: list[object]) -> str:
    return "--output_dir" if arguments[0] == CONVERT else "--engine_dir"


def run_make(arguments: list[object], *flags: object) -> Result:
    return run_command(str(arguments[0]), *arguments[1:], *flags)


def make_refused(
    root: Path, arguments: list[object], *flags: object, fragments: tuple[str, ...]
) -> str:
    fragments = (flag_of(arguments), *fragments)
    return refused(root, str(arguments[0]), *arguments[1:], *flags, fragments=fragments)


def test_an_output_directory_that_exists_is_refused_and_replaced_only_when_asked(
    make: Make, tmp_path: Path
) -> None:
    arguments = make(tmp_path / "new")
    assert run_make(arguments).exit_code == 0
    first = tree(tmp_path)
    make_refused(tmp_path, arguments, fragments=("exists", "--overwrite"))
    (weights,) = (tmp_path / "new").rglob("rank0.safetensors")
    weights.unlink()
    assert run_make(arguments, "--overwrite").exit_code == 0
    assert tree(tmp_path) == first


def test_an_empty_output_directory_is_filled(make: Make, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert run_make(make(tmp_path / "new")).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_foreign_directory_is_never_overwritten(make: Make, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"dear")
    arguments = make(tmp_path / "photos")
    make_refused(tmp_path, arguments, fragments=("exists",))
    make_refused(tmp_path, arguments, "--overwrite", fragments=("choose another directory",))


def test_a_foreign_directory_with_a_manifest_of_its_own_is_never_overwritten(
    make: Make, tmp_path: Path
) -> None:
    """A browser extension and many web pages have a manifest.json as well."""
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3, "name": "x"}')
    (tmp_path / "extension" / "background.js").write_text("dear")
    arguments = make(tmp_path / "extension")
    kind = "a checkpoint" if arguments[0] == CONVERT else "an engine"
    fragments = (f"no manifest.json of {kind} directory", "choose another directory")
    make_refused(tmp_path, arguments, "--overwrite", fragments=fragments)


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (0, "0 bytes"),
        (99, "99 bytes"),
        (2_000, "2.0 kB"),
        (99_000, "99.0 kB"),
        (100_000, "0.1 MB"),
    ],
)
def test_little_space_is_not_reported_as_nothing(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, message: str
) -> None:
    usage = shutil._ntuple_diskusage(free, 0, free)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    where = ("--model_dir", model_dir, "--output_dir", tmp_path / "new")
    line = refused(tmp_path, CONVERT, *where, *PLAIN, fragments=(f"has {message} free",))
    (needed,) = re.findall(r"needs ([0-9.]+) [kM]B", line)
    assert float(needed) > 0


def test_overwriting_an_engine_with_a_checkpoint_or_the_reverse_is_refused(
    make: Make, checkpoint_dir: Path, engine_dir: Path, tmp_path: Path
) -> None:
    """Hours of conversion are lost when the two flags are mixed up."""
    for other in (checkpoint_dir, engine_dir):
        copy = Path(shutil.copytree(other, tmp_path / other.name))
        arguments = make(copy)
        is_same_kind = (arguments[0] == CONVERT) == (other == checkpoint_dir)
        if not is_same_kind:
            make_refused(tmp_path, arguments, "--overwrite", fragments=("choose another",))


def test_an_engine_is_not_built_over_its_own_checkpoint(
    checkpoint_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(checkpoint_dir, tmp_path / "both"))
    arguments = ("--checkpoint_dir", copy, "--engine_dir", copy, "--overwrite", "--vision", "torch")
    refused(tmp_path, BUILD, *arguments, fragments=("--engine_dir",))


def test_an_output_directory_that_is_a_link_is_made_where_the_link_leads(
    make: Make, tmp_path: Path
) -> None:
    """`ln -s /mnt/large_disk/checkpoint checkpoint`: the link stays, the files go to that disk."""
    large_disk, home = tmp_path / "large_disk", tmp_path / "home"
    large_disk.mkdir()
    home.mkdir()
    (large_disk / "there").mkdir()
    for name in ("there", "not_yet_there"):
        link = home / name
        link.symlink_to(large_disk / name)
        arguments = make(link)
        assert run_make(arguments).exit_code == 0
        assert link.is_symlink()
        assert (large_disk / name / "manifest.json").is_file()
        make_refused(tmp_path, arguments, fragments=("exists", "--overwrite"))
        assert run_make(arguments, "--overwrite").exit_code == 0
        assert link.is_symlink()
    assert sorted(path.name for path in home.iterdir()) == ["not_yet_there", "there"]
    assert sorted(path.name for path in large_disk.iterdir()) == ["not_yet_there", "there"]


def test_an_output_directory_that_is_a_file_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    for flags in ((), ("--overwrite",)):
        make_refused(tmp_path, make(tmp_path / "file"), *flags, fragments=("is a file",))


def test_an_output_directory_below_a_file_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("dear")
    for name in ("file/new", "file/deeper/new"):
        make_refused(tmp_path, make(tmp_path / name), fragments=("cannot be written",))


@pytest.mark.parametrize("length", [300, 250])  # without and with room for ".partial"
def test_an_output_directory_with_too_long_a_name_is_refused(
    make: Make, tmp_path: Path, length: int
) -> None:
    make_refused(tmp_path, make(tmp_path / ("x" * length)), fragments=("name too long",))


def test_an_output_directory_where_nothing_can_be_made_is_refused(
    make: Make, tmp_path: Path
) -> None:
    make_refused(tmp_path, make("/proc/nvlm/new"), fragments=("/proc/nvlm", "cannot be written"))
    make_refused(tmp_path, make("/sys/nvlm"), fragments=("/sys/nvlm", "cannot be written"))


def test_an_output_directory_that_another_process_writes_is_refused(
    make: Make, tmp_path: Path
) -> None:
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "theirs").write_text("")
    other = os.open(tmp_path / "new.partial", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        make_refused(tmp_path, make(tmp_path / "new"), fragments=("another process",))
    finally:
        os.close(other)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks_is_reported_and_written(
    make: Make,
    tmp_path: Path,
    number: int,
    locks_fail: LocksFail,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lustre and FUSE without flock, NFS without its lock service, a directory on NFS."""
    locks_fail(number)
    done = run_make(make(tmp_path / "new"))
    assert done.exit_code == 0, done.stderr
    assert "new.partial lies on a file system without locks" in caplog.text
    assert (tmp_path / "new" / "manifest.json").is_file()


def test_a_file_called_partial_is_no_reason_for_a_traceback(make: Make, tmp_path: Path) -> None:
    (tmp_path / "new.partial").write_text("dear")
    make_refused(tmp_path, make(tmp_path / "new"), fragments=("new.partial",))


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_directory_of_the_user_called_old_is_left_alone(
    make: Make, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    """`mv checkpoint checkpoint.old` is what people do before they convert again."""
    arguments = make(tmp_path / "new")
    assert run_make(arguments).exit_code == 0
    (tmp_path / "new").rename(tmp_path / "new.old")
    if flags:
        assert run_make(arguments).exit_code == 0
    before = tree(tmp_path / "new.old")
    assert run_make(arguments, *flags).exit_code == 0
    assert tree(tmp_path / "new.old") == before


def test_what_appears_in_the_output_place_meanwhile_is_left_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion takes hours; the directory was free when it began."""
    write = json_files.write_json_atomically

    def write_and_meanwhile(path: Path, value: dict[str, Any]) -> None:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.tex").write_text("dear")
        write(path, value)

    monkeypatch.setattr("nvlm.formats.manifest.write_json_atomically", write_and_meanwhile)
    arguments = make(tmp_path / "new")
    one_line_error(run_make(arguments), flag_of(arguments), "exists")
    assert (tmp_path / "new" / "thesis.tex").read_text() == "dear"
