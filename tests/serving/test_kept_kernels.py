"""Kernels that an engine directory keeps: found elsewhere, at another path, and only where they
fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.formats import layout
from nvlm.program.errors import UserError
from runtime.engine.kept_kernels import keep_kernels, use_kernels
from runtime.serving import compile_kernels
from tests.support.command import ROOT

ABOUT = {"gpu": "NVIDIA H200", "triton": "3.6.0"}
KEY, LAUNCHER = "KERNELKEY", "LAUNCHERKEY"

# Triton compiles for Hopper on any machine; a hit takes no compiler.
_PROGRAM = """
import json, sys
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def add_one(x, BLOCK: tl.constexpr):
    place = x + tl.arange(0, BLOCK)
    tl.store(place, tl.load(place) + 1.0)

hits = []
triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
source = ASTSource(add_one, {"x": "*fp32", "BLOCK": "constexpr"}, {(1,): 128})
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(json.dumps([hits, len(kernel.asm["cubin"])]))
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """As Triton leaves one: a kernel in all its forms, and a module that launches it."""
    cache = tmp_path / "cache"
    kernel, launcher = cache / KEY, cache / LAUNCHER
    for folder in (kernel, launcher):
        folder.mkdir(parents=True)
    names = [f"add.{form}" for form in ("source", "ttir", "llir", "ptx", "cubin", "json")]
    for name in names:
        (kernel / name).write_text(name)
    paths = {name: str(kernel / name) for name in names}
    (kernel / "__grp__add.json").write_text(json.dumps({"child_paths": paths}))
    (launcher / "__triton_launcher.cpython-311-x86_64-linux-gnu.so").write_text("launcher")
    return cache


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    engine = tmp_path / "engine"
    engine.mkdir()
    return engine


def test_another_machine_finds_them_below_its_own_cache(
    cache: Path, engine: Path, tmp_path: Path
) -> None:
    assert keep_kernels(cache, engine, ABOUT) == 1
    shutil.rmtree(cache)
    moved, other = engine.rename(tmp_path / "mounted"), tmp_path / "home" / ".triton" / "cache"
    assert use_kernels(moved, other, ABOUT) == 1
    group = json.loads((other / KEY / "__grp__add.json").read_text())["child_paths"]
    assert {name: Path(path).read_text() for name, path in group.items()} == {
        "add.cubin": "add.cubin",
        "add.json": "add.json",
    }
    assert [path.name for path in other.iterdir()] == [KEY]  # no host code, no half-made folder
    assert use_kernels(moved, other, ABOUT) == 0


def test_only_names_below_the_folder_are_kept(cache: Path, engine: Path) -> None:
    keep_kernels(cache, engine, ABOUT)
    kept = {path.name for path in (engine / layout.KERNELS / KEY).iterdir()}
    assert kept == {"__grp__add.json", "add.cubin", "add.json"}
    group = json.loads((engine / layout.KERNELS / KEY / "__grp__add.json").read_text())
    assert group == {"child_paths": {"add.cubin": "add.cubin", "add.json": "add.json"}}


def test_a_list_that_points_elsewhere_is_not_followed(
    cache: Path, engine: Path, tmp_path: Path
) -> None:
    keep_kernels(cache, engine, ABOUT)
    group = engine / layout.KERNELS / KEY / "__grp__add.json"
    group.write_text(json.dumps({"child_paths": {"../../x.json": "x", "add.json": "/etc/x"}}))
    assert use_kernels(engine, tmp_path / "other", ABOUT) == 1
    found = json.loads((tmp_path / "other" / KEY / group.name).read_text())
    assert found["child_paths"] == {"add.json": str(tmp_path / "other" / KEY / "add.json")}


@pytest.mark.parametrize("change", [{"gpu": "NVIDIA H100"}, {"triton": "3.7.0"}, {"new": "1"}])
def test_those_of_another_gpu_or_version_are_left(
    cache: Path, engine: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    keep_kernels(cache, engine, ABOUT)
    assert use_kernels(engine, tmp_path / "other", ABOUT | change) == 0
    assert not (tmp_path / "other").exists()


def test_they_are_replaced_all_at_once(cache: Path, engine: Path) -> None:
    keep_kernels(cache, engine, {"gpu": "an older one"})
    assert keep_kernels(cache, engine, ABOUT) == 1
    assert [path.name for path in engine.iterdir()] == [layout.KERNELS]
    assert json.loads((engine / layout.KERNELS / layout.ABOUT_KERNELS).read_text()) == ABOUT


def test_an_engine_without_any_says_nothing(
    engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert use_kernels(engine, tmp_path / "other", ABOUT) == 0
    assert caplog.messages == []


@pytest.mark.parametrize("text", ["", "[1]", '{"gpu": 1}', "null"])
def test_a_damaged_description_is_no_reason_to_stop(
    cache: Path, engine: Path, tmp_path: Path, text: str
) -> None:
    keep_kernels(cache, engine, ABOUT)
    (engine / layout.KERNELS / layout.ABOUT_KERNELS).write_text(text)
    assert use_kernels(engine, tmp_path / "other", ABOUT) == 0


def test_a_damaged_list_or_a_cache_that_is_a_file_is_no_reason_to_stop(
    cache: Path, engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_kernels(cache, engine, ABOUT)
    (tmp_path / "file").write_text("")
    assert use_kernels(engine, tmp_path / "file", ABOUT) == 0
    (engine / layout.KERNELS / KEY / "__grp__add.json").write_text("[]")
    assert use_kernels(engine, tmp_path / "other", ABOUT) == 0
    assert all("are compiled anew" in message for message in caplog.messages)
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("what", ["kernels", f"kernels/{KEY}", f"kernels/{KEY}/add.cubin", "link"])
def test_code_that_others_can_write_is_not_run(
    cache: Path, engine: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    keep_kernels(cache, engine, ABOUT)
    if what == "link":
        (engine / layout.KERNELS / KEY / "more.cubin").symlink_to(tmp_path / "theirs")
    else:
        os.chmod(engine / what, 0o777)
    assert use_kernels(engine, tmp_path / "other", ABOUT) == 0
    assert "others can write" in caplog.text


def test_an_engine_that_cannot_be_written_opens(cache: Path, engine: Path, tmp_path: Path) -> None:
    keep_kernels(cache, engine, ABOUT)
    for path in (engine, *engine.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert use_kernels(engine, tmp_path / "other", ABOUT) == 1
        assert (tmp_path / "other" / KEY / "add.cubin").read_text() == "add.cubin"
    finally:
        for path in (engine, *engine.rglob("*")):
            path.chmod(0o755)


def test_without_a_gpu_there_is_nothing_to_compile(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr("sys.argv", ["x", "--engine_dir", str(engine_dir), "--device", "cpu"])
    with pytest.raises(UserError, match="expected a Hopper GPU"):
        compile_kernels.main()


@pytest.mark.process
@pytest.mark.slow
def test_triton_itself_finds_them(engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)

    def compile_with(cache: Path) -> list[object]:
        done = subprocess.run(
            [sys.executable, program],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "TRITON_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        return list(json.loads(done.stdout))

    hits, size = compile_with(tmp_path / "made")
    assert hits == [False]
    keep_kernels(tmp_path / "made", engine, ABOUT)
    shutil.rmtree(tmp_path / "made")
    use_kernels(engine, tmp_path / "other", ABOUT)
    assert compile_with(tmp_path / "other") == [[True], size]
