"""The house rules that a program can check."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nvlm.planning.tensorrt_llm_package import SUPPORTED
from tests.support.command import ROOT

DOCUMENTS = [
    ROOT / name
    for name in (
        *("README.md", "CONTRIBUTING.md"),
        *("docs/decisions.md", "docs/evaluation.md", "docs/hopper.md", "docs/ranks.md"),
        *("docs/tiny_model.md", "docs/triton.md"),
    )
]


def test_imports_go_only_in_the_stated_directions() -> None:
    """import-linter, with the contracts of pyproject.toml."""
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(program), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def tracked_files() -> set[Path]:
    """What a clone holds: an empty or untracked file here proves nothing there."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return {path.resolve() for path in ROOT.rglob("*")}
    done = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {ROOT / name for name in done.stdout.splitlines()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    local = [link for link in links if "://" not in link]
    tracked = tracked_files()
    assert [link for link in local if (document.parent / link).resolve() not in tracked] == []


def test_every_test_that_the_numerics_contract_names_exists() -> None:
    names = set(re.findall(r"\btest_\w+", (ROOT / "docs" / "decisions.md").read_text()))
    assert len(names) > 4
    assert [name for name in names if not list((ROOT / "tests").rglob(f"{name}.py"))] == []


def test_the_runtime_imports_without_what_only_building_needs() -> None:
    """`runtime` and the whole torch path load with onnx, onnxruntime and transformers absent."""
    blocked = ("onnx", "onnxruntime", "onnxscript", "transformers", "mpi4py", "tensorrt_llm")
    code = f"""
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import runtime.serving.runner, runtime.answers.batch
import runtime.decoder.torch_executor, runtime.vision.torch_executor
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_one_version_of_tensorrt_llm_is_named_everywhere() -> None:
    """In what refuses others, the packages' metadata, the image and the documents."""
    for name in ("pyproject.toml", "docker/Dockerfile", "docs/hopper.md", "README.md"):
        text = (ROOT / name).read_text()
        found = set(
            re.findall(r"(?:TensorRT-LLM |tensorrt-llm==|tensorrt_llm==|== ')(1\.\d[.\w]*)", text)
        )
        assert {version.rstrip(".") for version in found} == {SUPPORTED}, name


def test_no_package_holds_a_drawer_for_everything() -> None:
    names = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert not names & {"utils", "helpers", "common", "misc"}


def test_git_tracks_the_package_called_build() -> None:
    """Global ignore files often name build/; ours takes it back."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(
        [git, "check-ignore", "-q", "build/conversion/convert.py"], cwd=ROOT, check=False
    )
    assert done.returncode == 1
