"""The programs ask the network nothing and leave nothing in the home folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import ROOT

PROGRAM = ROOT / "tests" / "support" / "offline.py"
UNSHARE = ["unshare", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc"]


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command said, the names it looked up, and the files it left in a fresh home."""

    exit_code: int
    output: str
    names: list[str]
    files: list[str]


def run_offline(folder: Path, *command: object, **environment: str) -> Ran:
    """Runs it from the project's folder, in a network of its own and with an empty home folder."""
    home, notes = folder / "home", folder / "notes"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    notes.write_text("")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    kept.pop("ORT_DISABLE_TELEMETRY", None)  # ours, where this process imported ONNX Runtime
    done = subprocess.run(
        [*UNSHARE, sys.executable, str(PROGRAM), str(notes), *map(str, command)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        text=True,
        timeout=200,
        check=False,
    )
    files = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    return Ran(done.returncode, done.stdout, notes.read_text().split(), files)


@pytest.fixture(scope="module", autouse=True)
def _may_have_a_network_of_its_own() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    done = subprocess.run([*UNSHARE, "mount"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a network of its own is not granted here: {done.stderr.strip()}")


def silent(ran: Ran) -> None:
    assert ran.exit_code == 0, ran.output
    assert ran.names == [], ran.output
    assert ran.files == [], ran.output


PICTURE = ROOT / "tests" / "data" / "images" / "rgb.jpg"
SERVE_AND_ASK = """
import sys
from pathlib import Path
from tests.support.triton_server import serving

with serving(Path(sys.argv[1]), Path(sys.argv[2])) as served:
    answer = served.generate(text_input="What is it?", max_tokens=2)
    assert answer["num_tokens"] == 2, answer
"""


def test_a_look_up_is_noticed(tmp_path: Path) -> None:
    code = "import socket; socket.getaddrinfo('localhost', 80); socket.gethostbyname('a.example')"
    ran = run_offline(tmp_path, sys.executable, "-c", code)
    assert set(ran.names) == {"a.example"}, ran.output


def test_what_is_left_in_the_home_folder_is_noticed(tmp_path: Path) -> None:
    code = "import pathlib; pathlib.Path.home().joinpath('left').touch()"
    assert run_offline(tmp_path, sys.executable, "-c", code).files == ["left"]


def test_onnx_runtime_is_imported_with_its_telemetry_off(tmp_path: Path) -> None:
    """By a program of one's own too, which sets nothing. A user who wants it sets the variable."""
    code = (
        "import runtime.vision.onnxruntime_executor, build.engines.vision_onnxruntime, os;"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    ran = run_offline(tmp_path, sys.executable, "-c", code)
    silent(ran)
    assert ran.output == "1\n"
    chosen = run_offline(tmp_path, sys.executable, "-c", code, ORT_DISABLE_TELEMETRY="0")
    assert chosen.output == "0\n"


def test_nothing_else_imports_onnx_runtime() -> None:
    """What imports it itself would have its telemetry on."""
    own = re.compile(r"^\s*(import onnxruntime|from onnxruntime\b)", re.MULTILINE)
    folders = ("nvlm", "build", "runtime", "evaluation", "frontends", "tools", "bench", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = [path.name for path in [*paths, *ROOT.glob("*.py")] if own.search(path.read_text())]
    assert found == ["onnxruntime_package.py"]


def test_convert_build_run_and_serve_look_nothing_up_and_leave_nothing(
    model_dir: Path, tmp_path: Path
) -> None:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    convert = ("--model_dir", model_dir, "--output_dir", checkpoint, "--calib_size", 1)
    build = ("--checkpoint_dir", checkpoint, "--engine_dir", engine, "--vision", "onnxruntime")
    ask = ("--engine_dir", engine, "--image", PICTURE, "--prompt", "?", "--max_new_tokens", 2)
    for command in (
        ("convert_checkpoint.py", *convert),
        ("build_engine.py", *build),
        ("run.py", *ask),
        ("-c", SERVE_AND_ASK, engine, tmp_path),
    ):
        silent(run_offline(tmp_path, sys.executable, *command))
