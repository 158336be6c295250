"""What makes an artefact stale is the meaning of the code that makes it, and nothing else."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.formats.code_digest import code_digest, digest_of
from tests.support.command import BUILD, CONVERT, PLAIN, ROOT, background, run_command

SOURCES = {
    "nvlm/__init__.py": '"""A package."""\n__version__ = "1"\n',
    "nvlm/numbers.py": '''
"""Numbers."""
import math
from nvlm import text

HALF, BIG, IMAGINARY = 0.5, 10**20, 2j
NAMES = {"a": b"\\x00\\xff", "new in Unicode 15: \\N{INFINITY}": u"\U0001fae8", **text.NAMES}
"""What stands after a constant."""

def half(value: float, /, *rest: int, exact: bool = False, scale=1, **more: str) -> float:
    """Halve."""
    return math.floor(value * HALF) if exact else value * HALF

def double(value: float) -> float:
    """Double."""
    return value * 2

def told(value, width):
    return f"{value!r:>{width}} " "and {" f"{value = }" "" f"{value:}", lambda x: [*x, ...], -1

async def several(values):
    async for value in values:
        yield (last := value)
''',
    "nvlm/text.py": """
from __future__ import annotations
import nvlm.numbers

NAMES = {}

def shown(value):
    match value:
        case {"a": [1, *rest], **others} if rest:
            return others
        case str() | None:
            return nvlm.numbers.told(value, 3)
        case _:
            pass
    try:
        del value[1:2, ::3]
    except (KeyError, TypeError) as error:
        raise ValueError("none") from error
""",
    "build/__init__.py": "",
    "build/make.py": """
from nvlm import numbers
from nvlm.numbers import double, half
from nvlm.text import shown

class Maker:
    # A comment.
    value: float = 0.5
    numbers: float = 1.0

    def make(self) -> None:
        print(shown(half(self.value)), double(numbers.HALF) + 1)
""",
}
GOLDEN = "5301d19224be09d1ae17e7c3a96be924714cf19e2f04a2755a38e17e7a8d65fa"


def write_tree(root: Path, sources: dict[str, str]) -> Path:
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def digest_with(root: Path, changes: dict[str, list[tuple[str, str]]]) -> str:
    """The digest of SOURCES after replacements in each file, all of which must apply."""
    sources = dict(SOURCES)
    for name, replacements in changes.items():
        for old, new in replacements:
            assert old in sources[name], f"{old!r} is not in {name}"
            sources[name] = sources[name].replace(old, new)
    return digest_of(write_tree(root, sources))


@pytest.mark.parametrize("minor", [11, 12, 13])
@pytest.mark.process
def test_the_digest_is_the_same_on_every_python(tmp_path: Path, minor: int) -> None:
    root = write_tree(tmp_path, SOURCES)
    if sys.version_info[:2] == (3, minor):
        assert digest_of(root) == GOLDEN
        return
    python = shutil.which(f"python3.{minor}")
    if python is None or subprocess.run([python, "--version"], check=False).returncode != 0:
        pytest.skip(f"no Python 3.{minor} on this machine")
    code = "import sys, code_digest; print(code_digest.digest_of(code_digest.Path(sys.argv[1])))"
    done = subprocess.run(
        [python, "-c", code, str(root)],
        env={"PYTHONPATH": str(ROOT / "nvlm"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == GOLDEN


@pytest.mark.parametrize(
    "changes",
    [
        {"build/make.py": [("# A comment.", "# Another.\n")]},
        {"build/make.py": [("    def make", '    """A class."""\n\n    def make')]},
        {"nvlm/numbers.py": [('"""Halve."""', '"""Divide by two."""\n    # exactly\n')]},
        {"nvlm/numbers.py": [('"""What stands after a constant."""', "")]},
        {"nvlm/numbers.py": [('u"', '"'), ("2j", "2.0j"), ("10**20", "10 ** 20")]},
        {"nvlm/text.py": [("            pass", '            """Nothing."""')]},
        {"build/make.py": [("import double, half", "import half, double")]},
        {"build/make.py": [("import numbers\n", "import numbers as n\n"), ("numbers.H", "n.H")]},
        {"nvlm/text.py": [("import nvlm.numbers", "from . import numbers"), ("nvlm.n", "n")]},
    ],
)
def test_what_has_no_meaning_does_not_count(
    tmp_path: Path, changes: dict[str, list[tuple[str, str]]]
) -> None:
    assert digest_with(tmp_path, changes) == GOLDEN


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("nvlm/numbers.py", "value * 2", "value + 2"),
        ("nvlm/numbers.py", "HALF, BIG", "BIG, HALF"),
        ("nvlm/numbers.py", "0.5", "0.25"),
        ("nvlm/numbers.py", "10**20", "1e20"),
        ("nvlm/numbers.py", "exact: bool = False", "exact: bool = True"),
        ("nvlm/numbers.py", "scale=1", "scale=True"),
        ("nvlm/numbers.py", "exact: bool = False", "exact: bool"),
        ("nvlm/numbers.py", "{value!r", "{value!s"),
        ("nvlm/numbers.py", ":>{width}", ":<{width}"),
        ("nvlm/text.py", "| None", "| True"),
        ("nvlm/text.py", "[1:2, ::3]", "[1:2:3]"),
        ("nvlm/__init__.py", '"1"', '"2"'),
        ("build/make.py", "import double, half", "import half as double, double as half"),
        ("build/make.py", "import numbers\n", "import text as numbers\n"),
        ("build/make.py", "from nvlm.text import", "from nvlm.numbers import"),
        ("nvlm/text.py", "nvlm.numbers.told", "nvlm.text.told"),
        ("build/make.py", "value: float = 0.5", "value: float = numbers"),
        ("build/make.py", "def make(self)", "def make(self, numbers)"),
    ],
)
def test_what_has_a_meaning_counts(tmp_path: Path, name: str, old: str, new: str) -> None:
    assert digest_with(tmp_path, {name: [(old, new)]}) != GOLDEN


def test_two_modules_of_one_text_are_distinguished_by_what_they_import(tmp_path: Path) -> None:
    """Each passes on another function under the same name; the swap is seen two imports away."""
    sources = {
        "nvlm/one.py": "def made():\n    return 1\n",
        "nvlm/two.py": "def made():\n    return 2\n",
        "build/first.py": "from nvlm.one import made\n",
        "build/second.py": "from nvlm.two import made\n",
        "build/last.py": "from build.first import made\n",
    }
    swapped = {**sources, "build/last.py": "from build.second import made\n"}
    found = [
        digest_of(write_tree(tmp_path / name, tree))
        for name, tree in (("a", sources), ("b", swapped))
    ]
    assert found[0] != found[1]


def move_module(root: Path, old: str, new: str) -> None:
    """Moves a module as `git mv` and an editor would: every import and use is rewritten."""
    (root / new).parent.mkdir(exist_ok=True)
    (root / new).with_name("__init__.py").touch()
    (root / old).rename(root / new)
    (old_package, old_name), (new_package, new_name) = (
        name.removesuffix(".py").replace("/", ".").rsplit(".", 1) for name in (old, new)
    )
    rules = [
        (rf"from {old_package}\.{old_name} import", f"from {new_package}.{new_name} import"),
        (rf"from {old_package} import {old_name}\n", f"from {new_package} import {new_name}\n"),
    ]
    for path in [*root.glob("*.py"), *root.glob("nvlm/**/*.py"), *root.glob("build/**/*.py")]:
        text = before = path.read_text()
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text)
        if f"from {new_package} import {new_name}\n" in text:
            text = re.sub(rf"\b{old_name}\.(?=\w)", f"{new_name}.", text)
        if text != before:
            path.write_text(text)


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what makes artefacts."""
    copy = tmp_path / "project"
    for name in ("nvlm", "build"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "convert_checkpoint.py", "build_engine.py"):
        shutil.copy(ROOT / name, copy)
    return copy


def rewrite_without_meaning(project: Path) -> None:
    """Renames a module of each package and edits a docstring and a comment of each."""
    move_module(project, "nvlm/model/dtypes.py", "nvlm/formats/number_types.py")
    move_module(project, "build/conversion/quantization/cast.py", "build/casting.py")
    move_module(project, "build/engines/timing_cache.py", "build/engines/timings.py")
    replace_once(project / "nvlm/model/config.py", "would be a bug (heads", "is a bug (heads")
    replace_once(
        project / "nvlm/planning/device_memory.py", "    try:\n", "    try:  # a container\n"
    )
    replace_once(project / "build/__init__.py", '"""Makes', '"""It makes')
    replace_once(project / "build/conversion/journal.py", "may stop half way", "may stop early")


def change_an_operator(project: Path) -> None:
    replace_once(project / "nvlm/model/config.py", "remainder == 0", "remainder <= 0")


def test_a_module_of_the_project_may_be_renamed(project: Path) -> None:
    assert digest_of(project) == code_digest()
    rewrite_without_meaning(project)
    assert digest_of(project) == code_digest()
    change_an_operator(project)
    assert digest_of(project) != code_digest()


def make_engine(project: Path, model_dir: Path, made: Path) -> str:
    """`make engine` in a copy of the project; what it says."""
    variables = {
        "PYTHON": sys.executable,
        "SYSTEM_PYTHON": "1",
        "MODEL_DIR": model_dir,
        "CHECKPOINT_DIR": made / "checkpoint",
        "ENGINE_DIR": made / "engine",
        "QUANT": "none",
        "DECODER": "torch",
        "VISION": "torch",
    }
    return program(
        ["make", "engine", *(f"{name}={value}" for name, value in variables.items())], project
    )


def program(command: list[str], project: Path) -> str:
    done = subprocess.run(
        command,
        cwd=project,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.process
def test_only_what_the_code_means_makes_an_engine_stale_and_a_conversion_start_over(
    project: Path, model_dir: Path, tmp_path: Path
) -> None:
    """`make engine`, and a conversion that was killed half way."""
    made, other = tmp_path / "made", tmp_path / "other"
    made.mkdir()
    other.mkdir()
    source = ("--model_dir", model_dir, *PLAIN)
    assert run_command(CONVERT, *source, "--output_dir", made / "checkpoint").exit_code == 0
    targets = ("--decoder", "torch", "--vision", "torch", "--device", "cpu")
    flags = ("--checkpoint_dir", made / "checkpoint", "--engine_dir", made / "engine", *targets)
    assert run_command(BUILD, *flags).exit_code == 0
    place = ("--output_dir", other / "new")
    killed = background(
        CONVERT, *source, *place, log=tmp_path / "log", watched=other, kill_at=60
    ).wait()
    assert killed.exit_code == -signal.SIGKILL
    shutil.copytree(other / "new.partial", other / "again.partial")

    rewrite_without_meaning(project)
    printed = make_engine(project, model_dir, made)
    assert re.findall(r"(\w+) is up to date", printed) == ["checkpoint", "engine"], printed
    command = [sys.executable, "convert_checkpoint.py", *map(str, source), "--output_dir"]
    printed = program([*command, str(other / "new")], project)
    assert "of 8 steps" in printed, printed
    assert "starting over" not in printed

    change_an_operator(project)
    printed = make_engine(project, model_dir, made)
    assert re.findall(r"(checkpoint|engine) written to", printed) == ["checkpoint", "engine"], (
        printed
    )
    printed = program([*command, str(other / "again")], project)
    assert "is of other arguments, input or versions: starting over" in printed
    assert (other / "again").is_dir()
