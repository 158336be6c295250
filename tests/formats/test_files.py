"""What is written to disk: safetensors, manifests, output directories, JSON."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from build.output.output_dir import OutputPlace, check_replaceable, staged_directory
from build.output.safetensors_writer import SafetensorsWriter
from evaluation.datasets.records import json_lines, read_json
from nvlm.formats import manifest
from nvlm.formats.safetensors_reader import SafetensorsReader, TensorInfo
from nvlm.model.dtypes import SAFETENSORS_NAMES
from nvlm.program.errors import UserError
from nvlm.program.json_files import StrictReader, read_json_object, write_json_atomically
from nvlm.program.jsonl import read_jsonl_lines

ROOT = Path(__file__).parents[2]


def infos_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str] | None = None) -> None:
    with SafetensorsWriter(path, infos_of(tensors)) as writer:
        write_all(writer, order or list(tensors), tensors)


def write_all(
    writer: SafetensorsWriter, order: list[str], tensors: dict[str, torch.Tensor]
) -> None:
    for name in order:
        writer.write(name, tensors[name])


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit by bit, so that NaN and -0 count."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes_of(found[name]) == bytes_of(tensor), name


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    values = torch.tensor([[1.5, -0.0, 448.0], [-2.0, 0.015625, float("nan")]])
    return {
        "matrix": values.to(dtype),
        "scalar": torch.tensor(3.0).to(dtype),
        "empty": torch.empty(0).to(dtype),
        "no rows": torch.empty(0, 4).to(dtype),
        "one": torch.tensor([7.0]).to(dtype),  # odd number of bytes in FP8
        "deep.ünïcode.名": torch.arange(24.0).reshape(2, 3, 4).to(dtype),
    }


class TestSafetensors:
    @pytest.mark.parametrize("dtype", list(SAFETENSORS_NAMES), ids=str)
    def test_what_the_writer_writes_the_library_reads(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        write(tmp_path / "x.safetensors", tensors_of(dtype))
        assert_same(load_file(tmp_path / "x.safetensors"), tensors_of(dtype))

    @pytest.mark.parametrize("dtype", list(SAFETENSORS_NAMES), ids=str)
    def test_what_the_library_writes_the_reader_reads(
        self, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        save_file(tensors_of(dtype), tmp_path / "x.safetensors")
        reader = SafetensorsReader(tmp_path / "x.safetensors")
        assert reader.tensors == infos_of(tensors_of(dtype))
        assert_same({name: reader.read(name) for name in reader.tensors}, tensors_of(dtype))

    @pytest.mark.parametrize("seed", range(5))
    def test_the_order_of_writing_does_not_change_a_byte(self, tmp_path: Path, seed: int) -> None:
        tensors = {f"{d} {n}": t for d in SAFETENSORS_NAMES for n, t in tensors_of(d).items()}
        order = random.Random(seed).sample(list(tensors), len(tensors))
        write(tmp_path / "x.safetensors", tensors)
        write(tmp_path / "y.safetensors", tensors, order)
        written = (tmp_path / "y.safetensors").read_bytes()
        assert written == (tmp_path / "x.safetensors").read_bytes()
        assert_same(load_file(tmp_path / "y.safetensors"), tensors)

    def test_a_file_without_tensors_is_readable(self, tmp_path: Path) -> None:
        write(tmp_path / "x.safetensors", {})
        assert load_file(tmp_path / "x.safetensors") == {}

    def test_strided_tensors_are_written_by_value(self, tmp_path: Path) -> None:
        tensors = {"t": torch.arange(12.0).reshape(3, 4).t(), "step": torch.arange(9.0)[::2]}
        write(tmp_path / "x.safetensors", tensors)
        assert_same(load_file(tmp_path / "x.safetensors"), tensors)

    @pytest.mark.parametrize("missing", ["matrix", "empty"])
    def test_a_tensor_never_written_is_an_assertion_that_names_it(
        self, tmp_path: Path, missing: str
    ) -> None:
        tensors = tensors_of(torch.float32)
        infos, kept = infos_of(tensors), [name for name in tensors if name != missing]
        with (
            pytest.raises(AssertionError, match=f"never written: .*{missing}"),
            SafetensorsWriter(tmp_path / "x.safetensors", infos) as writer,
        ):
            write_all(writer, kept, tensors)

    @pytest.mark.parametrize(
        "wrong", [torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2), torch.zeros(6)]
    )
    def test_another_type_or_shape_than_announced_is_an_assertion(
        self, tmp_path: Path, wrong: torch.Tensor
    ) -> None:
        infos = infos_of({"a": torch.zeros(2, 3)})
        with (
            pytest.raises(AssertionError, match="a: "),
            SafetensorsWriter(tmp_path / "x.safetensors", infos) as writer,
        ):
            writer.write("a", wrong)

    def test_an_error_within_the_block_is_passed_on_as_it_is(self, tmp_path: Path) -> None:
        infos = infos_of({"a": torch.zeros(2)})
        with (
            pytest.raises(KeyboardInterrupt),
            SafetensorsWriter(tmp_path / "x.safetensors", infos),
        ):
            raise KeyboardInterrupt

    @pytest.mark.parametrize("order", ["abc", "cab", "cba"])
    def test_the_digest_is_the_files_in_any_order_and_is_done_when_the_last_tensor_is(
        self, tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tensors = {name: torch.full((5,), float(value)) for value, name in enumerate("abc")}
        path = tmp_path / "x.safetensors"
        with SafetensorsWriter(path, infos_of(tensors)) as writer:
            write_all(writer, list(order), tensors)
            monkeypatch.delattr(os, "pread")
            found = writer.sha256()
        assert found == hashlib.sha256(path.read_bytes()).hexdigest()

    def test_an_existing_file_is_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_text("mine")
        with pytest.raises(FileExistsError):
            SafetensorsWriter(tmp_path / "x.safetensors", {})
        assert (tmp_path / "x.safetensors").read_text() == "mine"

    def test_the_file_has_its_full_size_before_anything_is_written(self, tmp_path: Path) -> None:
        tensor = torch.ones(1000, 1000, dtype=torch.bfloat16)
        path = tmp_path / "x.safetensors"
        with SafetensorsWriter(path, infos_of({"a": tensor})) as writer:
            before = path.stat()
            writer.write("a", tensor)
        assert before.st_size == path.stat().st_size > 2_000_000
        assert before.st_blocks * 512 > 2_000_000, "sparse: a full disk comes too late"

    @pytest.mark.parametrize("length", [0, 4, 50, -1])
    def test_a_file_cut_short_is_refused_by_path(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "x.safetensors"
        write(path, tensors_of(torch.float32))
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(UserError, match=str(path)):
            SafetensorsReader(path)

    def test_a_missing_file_and_an_unknown_type_are_refused_by_path(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"none.safetensors does not exist"):
            SafetensorsReader(tmp_path / "none.safetensors")
        save_file({"a": torch.zeros(2, dtype=torch.int32)}, tmp_path / "x.safetensors")
        with pytest.raises(UserError, match=r"x.safetensors: a is stored as I32, expected one of"):
            SafetensorsReader(tmp_path / "x.safetensors")


def place_of(path: Path, overwrite: bool) -> OutputPlace:
    return OutputPlace(path, "--engine_dir", "engine", overwrite)


def make_finished(directory: Path, content: str = "tokens") -> Path:
    (directory / "deep").mkdir(parents=True)
    (directory / "a.txt").write_text(content)
    (directory / "deep" / "b.bin").write_bytes(bytes(1000))
    write_manifest(directory)
    return directory


def write_manifest(directory: Path) -> manifest.Manifest:
    return manifest.write_manifest(
        directory, "engine", arguments={"x": None}, limits={"max_batch_size": 8}, source={"s": 1}
    )


class TestManifest:
    def test_what_was_written_is_read_back(self, tmp_path: Path) -> None:
        directory = make_finished(tmp_path / "engine")
        read = manifest.read_manifest(directory, "engine")
        assert (read.arguments, read.limits, read.source) == (
            {"x": None},
            {"max_batch_size": 8},
            {"s": 1},
        )
        assert set(read.files) == {"a.txt", "deep/b.bin"}
        assert read.files["deep/b.bin"] == manifest.FileEntry(
            # sha256sum of 1000 zero bytes
            1000,
            "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53",
        )
        assert manifest.verify_all(directory, "engine") == read

    def test_the_digest_changes_with_any_file_and_with_nothing_else(self, tmp_path: Path) -> None:
        same, also, other = (
            manifest.read_manifest(make_finished(tmp_path / name, content), "engine").digest
            for name, content in (("1", "tokens"), ("2", "tokens"), ("3", "Tokens"))
        )
        assert same == also != other

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: (d / "a.txt").unlink(), "{d}/a.txt is missing"),
            (lambda d: (d / "a.txt").write_text("tokenz"), "{d}/a.txt has changed"),
            (
                lambda d: (d / "a.txt").write_text("token"),
                "{d}/a.txt has 5 bytes, the manifest says 6",
            ),
            (lambda d: (d / "deep/b.bin").write_bytes(bytes(1001)), "{d}/deep/b.bin has 1001"),
            (lambda d: shutil.rmtree(d / "deep"), "{d}/deep/b.bin is missing"),
            (lambda d: (d / "manifest.json").unlink(), "{d} has no manifest.json"),
            (lambda d: shutil.rmtree(d), "{d} does not exist"),
            (
                lambda d: (d / "manifest.json").write_text("{"),
                "{d}/manifest.json is not valid JSON",
            ),
            (lambda d: (d / "manifest.json").write_text("[]"), "{d}/manifest.json holds a JSON"),
            (lambda d: (d / "manifest.json").write_bytes(b"\xff"), "{d}/manifest.json is not"),
        ],
        ids=[
            "missing file",
            "altered",
            "truncated",
            "grown",
            "missing folder",
            "missing manifest",
            "missing directory",
            "damaged JSON",
            "no object",
            "no text",
        ],
    )
    def test_damage_is_refused_by_path_with_the_command_that_fixes_it(
        self, tmp_path: Path, damage: Callable[[Path], object], message: str
    ) -> None:
        directory = make_finished(tmp_path / "engine")
        damage(directory)
        with pytest.raises(UserError) as error:
            manifest.read_manifest(directory, "engine")
        assert message.format(d=directory) in str(error.value)
        if "JSON" not in message and "is not" not in message:
            # What has no manifest may be somebody's own: another directory, not this one.
            again = "" if "no manifest" in message else f" {directory}"
            assert f"build_engine.py --engine_dir{again}" in str(error.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"kind": "checkpoint"}, "'checkpoint'"),
            ({"kind": None}, "None"),
            ({"format_version": 2}, "format 2"),
            ({"format_version": "1"}, "format '1'"),
            ({"files": []}, "damaged"),
            ({"files": {"a.txt": {"size_bytes": 6}}}, "damaged"),
            ({"files": {"a.txt": {"size_bytes": "6", "sha256": ""}}}, "damaged"),
            ({"files": {"a.txt": None}}, "damaged"),
            ({"files": ...}, "damaged"),
            ({"limits": ...}, "damaged"),
            ({"surprise": 1}, "surprise"),
        ],
        ids=str,
    )
    def test_another_kind_version_or_structure_is_refused_by_path(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        """`...` takes the key away."""
        directory = make_finished(tmp_path / "engine")
        path = directory / "manifest.json"
        values = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
        with pytest.raises(UserError) as error:
            manifest.read_manifest(directory, "engine")
        assert str(path) in str(error.value)
        assert message in str(error.value)

    def test_large_files_are_checked_by_size_and_by_hash_only_when_asked(
        self, tmp_path: Path
    ) -> None:
        directory = make_finished(tmp_path / "engine")
        large = directory / "large.bin"
        with open(large, "wb") as file:
            file.truncate((16 << 20) + 1)
        write_manifest_again(directory)
        with open(large, "rb+") as file:
            file.write(b"x")
        assert "large.bin" in manifest.read_manifest(directory, "engine").files
        with pytest.raises(UserError, match=r"large.bin has changed"):
            manifest.verify_all(directory, "engine")


def write_manifest_again(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    write_manifest(directory)


def stage(final: Path, *, overwrite: bool = False, content: str = "new") -> None:
    with staged_directory(place_of(final, overwrite)) as staging:
        (staging / "a.txt").write_text(content)
        write_manifest(staging)


def stage_half(final: Path, error: BaseException) -> None:
    with staged_directory(place_of(final, True)) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "a.txt").write_text("half")
        raise error


class TestOutputDirectory:
    def test_it_appears_when_the_block_ends_and_not_before(self, tmp_path: Path) -> None:
        final = tmp_path / "deep" / "engine"
        with staged_directory(place_of(final, False)) as staging:
            (staging / "a.txt").write_text("new")
            assert not final.exists()
        assert (final / "a.txt").read_text() == "new"
        assert os.listdir(final.parent) == ["engine"], "nothing is left beside it"

    @pytest.mark.parametrize(
        "error", [ValueError("x"), UserError("x"), KeyboardInterrupt(), SystemExit(3)], ids=repr
    )
    @pytest.mark.parametrize("exists", [False, True], ids=["new", "replacing"])
    def test_an_error_leaves_everything_as_it_was(
        self, tmp_path: Path, error: BaseException, exists: bool
    ) -> None:
        final = tmp_path / "engine"
        if exists:
            make_finished(final, "old")
        with pytest.raises(type(error)) as raised:
            stage_half(final, error)
        assert raised.value is error
        assert os.listdir(tmp_path) == (["engine"] if exists else [])
        if exists:
            assert (final / "a.txt").read_text() == "old"
            manifest.verify_all(final, "engine")

    def test_our_own_is_replaced_whole_with_overwrite(self, tmp_path: Path) -> None:
        final = make_finished(tmp_path / "engine", "old")
        stage(final, overwrite=True)
        assert sorted(os.listdir(final)) == ["a.txt", "manifest.json"]
        assert (final / "a.txt").read_text() == "new"
        assert os.listdir(tmp_path) == ["engine"]

    def test_our_own_is_kept_without_overwrite(self, tmp_path: Path) -> None:
        final = make_finished(tmp_path / "engine", "old")
        with pytest.raises(UserError, match=f"--engine_dir {final} exists.*--overwrite"):
            stage(final)
        assert (final / "a.txt").read_text() == "old"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_foreign_directory_is_never_replaced(self, tmp_path: Path, overwrite: bool) -> None:
        final = tmp_path / "photos"
        final.mkdir()
        (final / "cat.jpg").write_text("mine")
        with pytest.raises(UserError, match=f"--engine_dir {final}"):
            stage(final, overwrite=overwrite)
        assert os.listdir(final) == ["cat.jpg"]
        assert os.listdir(tmp_path) == ["photos"]

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_is_never_replaced(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "engine").write_text("mine")
        with pytest.raises(UserError, match="is a file"):
            stage(tmp_path / "engine", overwrite=overwrite)
        assert (tmp_path / "engine").read_text() == "mine"

    def test_an_empty_directory_is_as_good_as_none(self, tmp_path: Path) -> None:
        (tmp_path / "engine").mkdir()
        check_replaceable(place_of(tmp_path / "engine", False))
        stage(tmp_path / "engine")
        assert (tmp_path / "engine" / "a.txt").read_text() == "new"

    @pytest.mark.parametrize("exists", ["ours", "empty"])
    def test_a_directory_of_the_users_beside_it_is_not_deleted(
        self, tmp_path: Path, exists: str
    ) -> None:
        """A copy called engine.old is what a careful user makes before --overwrite."""
        final = tmp_path / "engine"
        if exists == "ours":
            make_finished(final, "old")
        else:
            final.mkdir()
        (tmp_path / "engine.old").mkdir()
        (tmp_path / "engine.old" / "backup").write_text("mine")
        stage(final, overwrite=True)
        assert (final / "a.txt").read_text() == "new"
        assert (tmp_path / "engine.old" / "backup").read_text() == "mine"

    def test_what_a_killed_run_left_is_cleared_first(self, tmp_path: Path) -> None:
        stale = tmp_path / "engine.partial"
        (stale / "deep").mkdir(parents=True)
        (stale / "deep" / "half.bin").write_text("half")
        (stale / ".unfinished").touch()  # what distinguishes ours from a user's
        (stale / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "mine").write_text("mine")
        place = tmp_path / "engine"
        with staged_directory(place_of(place, False)) as staging:
            assert os.listdir(staging) == [".unfinished"]
        assert os.listdir(place) == []
        assert (tmp_path / "elsewhere" / "mine").read_text() == "mine", "links are not followed"

    def test_a_directory_called_partial_that_is_not_ours_is_kept(self, tmp_path: Path) -> None:
        theirs = tmp_path / "engine.partial"
        theirs.mkdir()
        (theirs / "precious").write_text("dear")
        with (
            pytest.raises(UserError, match="did not write"),
            staged_directory(place_of(tmp_path / "engine", True)),
        ):
            pass
        assert (theirs / "precious").read_text() == "dear"

    def test_a_link_called_partial_is_not_followed(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "precious").write_text("dear")
        (tmp_path / "engine.partial").symlink_to(tmp_path / "theirs", target_is_directory=True)
        with (
            pytest.raises(UserError, match="cannot be written"),
            staged_directory(place_of(tmp_path / "engine", True)),
        ):
            pass
        assert (tmp_path / "theirs" / "precious").read_text() == "dear"

    def test_a_mount_point_is_refused_before_any_work(self) -> None:
        with pytest.raises(UserError, match="is a mount point; give a directory inside it"):
            check_replaceable(place_of(Path("/proc"), True))

    def test_the_second_of_two_writers_is_refused_and_the_first_undisturbed(
        self, tmp_path: Path
    ) -> None:
        final = tmp_path / "engine"
        with staged_directory(place_of(final, False)) as staging:
            (staging / "a.txt").write_text("first")
            with pytest.raises(UserError, match=r"another process is writing .*--engine_dir"):
                stage(final)
            assert (staging / "a.txt").read_text() == "first"
        assert (final / "a.txt").read_text() == "first"

    @pytest.mark.process
    def test_another_process_that_writes_is_noticed_too(self, tmp_path: Path) -> None:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from pathlib import Path\n"
            "from nvlm.program.errors import UserError\n"
            "from build.output.output_dir import OutputPlace, staged_directory\n"
            "try:\n"
            "    place = OutputPlace(Path(sys.argv[2]), '--engine_dir', 'engine', False)\n"
            "    with staged_directory(place): pass\n"
            "except UserError as error: print(error)\n"
        )
        final = tmp_path / "engine"
        with staged_directory(place_of(final, False)):
            other = subprocess.run(
                [sys.executable, "-c", code, str(ROOT), str(final)],
                capture_output=True,
                text=True,
                check=True,
            )
        assert "another process is writing" in other.stdout

    def test_the_lock_ends_with_the_block(self, tmp_path: Path) -> None:
        with (
            pytest.raises(ValueError, match="x"),
            staged_directory(place_of(tmp_path / "engine", False)),
        ):
            raise ValueError("x")
        stage(tmp_path / "engine")
        fd = os.open(tmp_path / "engine", os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_the_users_to_fix(self, tmp_path: Path, number: int) -> None:
        final = tmp_path / "engine"
        with (
            pytest.raises(UserError, match=f"disk of --engine_dir {final} is full"),
            staged_directory(place_of(final, False)),
        ):
            raise OSError(number, os.strerror(number))
        assert os.listdir(tmp_path) == []

    def test_another_operating_system_error_keeps_its_traceback(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OSError, match="Input/output") as error,
            staged_directory(place_of(tmp_path / "engine", False)),
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert error.value.errno == errno.EIO

    def test_too_little_free_space_is_refused_before_the_block_runs(self, tmp_path: Path) -> None:
        final = tmp_path / "engine"
        ran = []
        with (
            pytest.raises(UserError, match=r"needs 1000000000000.0 GB but its disk has"),
            staged_directory(place_of(final, False), needed_bytes=10**21),
        ):
            ran.append(True)
        assert ran == []
        assert os.listdir(tmp_path) == []

    def test_a_parent_that_is_a_file_is_the_users_mistake(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UserError, match="--engine_dir"):
            stage(tmp_path / "file" / "engine")

    def test_a_file_in_the_place_of_the_partial_directory_is_refused_and_kept(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "engine.partial").write_text("mine")
        with pytest.raises(UserError, match=r"engine.partial"):
            stage(tmp_path / "engine")
        assert (tmp_path / "engine.partial").read_text() == "mine"


class TestJson:
    def test_what_was_written_is_read_back(self, tmp_path: Path) -> None:
        value = {"text": "猫\u2028\n", "nested": {"list": [1, 2.5, None, True]}}
        write_json_atomically(tmp_path / "x.json", value)
        assert read_json_object(tmp_path / "x.json") == value
        assert os.listdir(tmp_path) == ["x.json"]

    def test_a_value_that_cannot_be_written_leaves_the_old_file(self, tmp_path: Path) -> None:
        write_json_atomically(tmp_path / "x.json", {"a": 1})
        with pytest.raises(TypeError):
            write_json_atomically(tmp_path / "x.json", {"b": object()})
        assert read_json_object(tmp_path / "x.json") == {"a": 1}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "does not exist"),
            (b"", "is not valid JSON"),
            (b'{"a": 1', "is not valid JSON"),
            (b"\xff\xfe", "is not valid JSON"),
            (b"[1]", "holds a JSON list, expected an object"),
            (b"null", "holds a JSON NoneType, expected an object"),
            (
                b"version https://git-lfs.github.com/spec/v1\n",
                "is a pointer of Git LFS, .*lfs pull",
            ),
        ],
    )
    def test_what_is_no_object_is_refused_by_path(
        self, tmp_path: Path, content: bytes | None, message: str
    ) -> None:
        path = tmp_path / "x.json"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} {message}"):
            read_json_object(path)

    def test_a_directory_in_its_place_is_refused_by_path(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"{tmp_path} cannot be read"):
            read_json_object(tmp_path)


class TestStrictReader:
    VALUES: ClassVar[dict[str, object]] = {
        "size": 8,
        "zero": 0,
        "flag": True,
        "text": "gelu",
        "eps": 1e-6,
        "null": None,
        "nan": float("nan"),
        "infinity": float("inf"),
        "inner": {"deep": {"size": -1}},
    }

    @pytest.fixture
    def reader(self) -> StrictReader:
        return StrictReader(self.VALUES, Path("dir/config.json"))

    def test_values_of_the_right_kind_are_given(self, reader: StrictReader) -> None:
        assert reader.positive_int("size") == 8
        assert reader.positive_float("eps") == 1e-6
        assert type(reader.positive_float("size")) is float
        assert reader.string("text") == "gelu"
        assert reader.one_of("text", ("relu", "gelu")) == "gelu"
        assert reader.one_of("null", (None,)) is None
        assert reader.section("inner").section("deep").values == {"size": -1}

    def test_a_default_stands_for_a_missing_key_only(self, reader: StrictReader) -> None:
        assert reader.one_of("absent", (False, True), default=False) is False
        with pytest.raises(UserError, match="text is 'gelu'"):
            reader.one_of("text", ("silu",), default="silu")

    @pytest.mark.parametrize(
        ("read", "message"),
        [
            (lambda r: r.positive_int("absent"), "absent is missing"),
            (lambda r: r.positive_float("absent"), "absent is missing"),
            (lambda r: r.string("absent"), "absent is missing"),
            (lambda r: r.section("absent"), "absent is missing"),
            (lambda r: r.one_of("absent", (1,)), "absent is missing"),
            (lambda r: r.positive_int("zero"), "zero is 0, expected a positive integer"),
            (lambda r: r.positive_int("flag"), "flag is True, expected a positive integer"),
            (lambda r: r.positive_int("eps"), "eps is 1e-06, expected a positive integer"),
            (lambda r: r.positive_int("text"), "text is 'gelu', expected a positive integer"),
            (lambda r: r.positive_float("zero"), "zero is 0, expected a positive number"),
            (lambda r: r.positive_float("flag"), "flag is True, expected a positive number"),
            (lambda r: r.positive_float("text"), "text is 'gelu', expected a positive number"),
            (lambda r: r.positive_float("nan"), "nan is nan, expected a positive number"),
            (lambda r: r.positive_float("infinity"), "infinity is inf, expected a positive"),
            (lambda r: r.string("size"), "size is 8, expected a string"),
            (lambda r: r.string("null"), "null is None, expected a string"),
            (lambda r: r.section("text"), "text is 'gelu', expected an object"),
            (lambda r: r.one_of("size", (1, 2)), "size is 8, expected 1 or 2"),
            (lambda r: r.one_of("flag", (1, 0)), "flag is True, expected 1 or 0"),
            (lambda r: r.one_of("zero", (False,)), "zero is 0, expected False"),
            (
                lambda r: r.section("inner").section("deep").positive_int("size"),
                "inner.deep.size is -1",
            ),
            (lambda r: r.section("inner").string("absent"), "inner.absent is missing"),
        ],
    )
    def test_a_complaint_names_file_key_and_what_was_expected(
        self, reader: StrictReader, read: Callable[[StrictReader], object], message: str
    ) -> None:
        with pytest.raises(UserError) as error:
            read(reader)
        assert str(error.value).startswith(f"dir/config.json: {message}")


@pytest.mark.parametrize(
    "read", [read_json, json_lines, lambda path: read_jsonl_lines(path, "--calib_data")]
)
def test_a_device_is_no_data_file(read: Callable[[Path], object]) -> None:
    """/dev/zero would be read without end."""
    with pytest.raises(UserError, match="/dev/zero is a device"):
        read(Path("/dev/zero"))
