"""What launches kept kernels is compiled beside loading, as Triton itself would compile it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.engine.launchers import read_types
from tests.support.command import ROOT

# As on a GPU machine, whose driver is missing here: nothing is linked with it, nothing is loaded.
_PROGRAM = """
import json, sys
from pathlib import Path
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from triton.runtime import build
from runtime.engine.launchers import compile_beside, read_types, recording

driver.library_dirs, driver.libraries = lambda: [], []

@triton.jit
def add(x, y, number, scale, BLOCK: tl.constexpr):
    place = x + tl.arange(0, BLOCK)
    tl.store(place, (tl.load(place) + number) * scale)

types = {"x": "*fp32", "y": "*bf16", "number": "i32", "scale": "fp32", "BLOCK": "constexpr"}
with recording() as found:
    for block in (64, 128):
        triton.compile(ASTSource(add, types, {(4,): block}), target=GPUTarget("cuda", 90, 32))
assert triton.knobs.compilation.listener is None
file = Path(sys.argv[1])
file.write_text(json.dumps(found))
compile_beside(read_types(file)).join()

def never(*_):
    raise AssertionError("it was compiled")

build._build, build._load_module_from_path = never, lambda name, path: path
places = dict(library_dirs=[], include_dirs=[], libraries=[])
signature = dict(enumerate(types.values()))
launcher = driver.make_launcher({(4,): 64}, signature, None)
print(build.compile_module_from_src(launcher, "__triton_launcher", **places))
utilities = Path(driver.dirname, "driver.c").read_text()
print(build.compile_module_from_src(utilities, "cuda_utils", **places))
"""

# A machine without Python's headers.
_WITHOUT_HEADERS = """
import sysconfig
from triton.backends.nvidia import driver
from runtime.engine.launchers import compile_beside

driver.library_dirs, driver.libraries = lambda: [], []
paths = sysconfig.get_paths()
sysconfig.get_paths = lambda **_: paths | {"include": "/nowhere"}
compile_beside([("*fp32",) * number for number in range(8)]).join()
"""


@pytest.mark.process
def test_triton_finds_what_was_compiled_beside(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("needs a C compiler")
    program, cache = tmp_path / "program.py", tmp_path / "cache"
    program.write_text(_PROGRAM)
    environment = {"PATH": os.environ["PATH"], "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, program, tmp_path / "types.json"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "types.json").read_text()) == [
        ["*fp32", "*bf16", "i32", "fp32", "constexpr"]
    ]
    paths = [Path(line) for line in done.stdout.split()]
    assert [path.name.partition(".")[0] for path in paths] == ["__triton_launcher", "cuda_utils"]
    assert all(cache in path.parents for path in paths)


@pytest.mark.process
def test_a_compiler_that_fails_says_so_once(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("needs a C compiler")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_HEADERS],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("#include <Python.h>") == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "1",
        '["*fp32"]',
        "[[1]]",
        '[["i32); system(\\"x\\""]]',
        '[["tensordesc<fp16[8]>"]]',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_anything_else_than_types_is_not_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "types.json").write_text(text)
    assert read_types(tmp_path / "types.json") == []
    assert read_types(tmp_path / "none.json") == []


def test_types_are_read(tmp_path: Path) -> None:
    (tmp_path / "types.json").write_text('[["*fp8e4nv", "i64", "constexpr"], []]')
    assert read_types(tmp_path / "types.json") == [("*fp8e4nv", "i64", "constexpr"), ()]
