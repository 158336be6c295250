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
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    local = [link for link in links if "://" not in link]
    tracked = tracked_files()
    assert [link for link in local if (document.parent / link).resolve() not in tracked] == []


def anchors(document: Path) -> set[str]:
    """GitHub's anchor of each heading: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_anchors_in_links_are_headings(document: Path) -> None:
    links = re.findall(r"\]\(([^):#]*)#([^)]+)\)", document.read_text())
    found = [
        (path, anchor, (document.parent / path) if path else document) for path, anchor in links
    ]
    assert [row[:2] for row in found if row[1] not in anchors(row[2])] == []


def test_every_test_that_the_numerics_contract_names_exists() -> None:
    contract = (ROOT / "docs" / "numerics.md").read_text()
    assert len(set(re.findall(r"\btest_\w+", contract))) > 4
    texts = [contract, *(path.read_text() for path in DECISIONS)]
    names = {name for text in texts for name in re.findall(r"\btest_\w+", text)}
    assert [name for name in names if not list((ROOT / "tests").rglob(f"{name}.py"))] == []


def numbered_decisions() -> dict[int, str]:
    """The file, relative to the root, of each decision; raises where a number comes twice."""
    found: dict[int, str] = {}
    for path in DECISIONS:
        for number in re.findall(
            r"^## (\d+)\. .*\n\d{4}-\d\d-\d\d.*$", path.read_text(), re.MULTILINE
        ):
            assert int(number) not in found, f"decision {number} stands twice"
            found[int(number)] = str(path.relative_to(ROOT))
    return found


def test_decisions_are_dated_and_numbered_without_a_gap() -> None:
    num_headings = sum(path.read_text().count("\n## ") for path in DECISIONS)
    assert sorted(numbered_decisions()) == list(range(1, num_headings + 1))


def test_what_cites_a_decision_names_its_file() -> None:
    """In code and documents: "decision 12 (docs/decisions/inputs.md)", or a link under it."""
    cited = re.compile(
        r"\bdecisions? (\d+)(?: to \d+)?\s+\((docs/decisions/\w+\.md)\)"
        r"|\[decision (\d+)\]\((?:docs/)?(decisions/\w+\.md)\)"
    )
    where = numbered_decisions()
    found = []
    for path in tracked_files():
        if path.suffix in (".py", ".md") and path.is_file() and path != Path(__file__).resolve():
            for in_code, code_file, in_link, linked_file in cited.findall(path.read_text()):
                found.append(
                    (path.name, int(in_code or in_link), code_file or f"docs/{linked_file}")
                )
    assert len(found) > 3
    assert [item for item in found if where.get(item[1]) != item[2]] == []


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


def test_every_file_and_folder_that_the_map_names_exists() -> None:
    """What stands in backticks, from the root or from any folder."""
    text = (ROOT / "docs" / "structure.md").read_text()
    named = set(re.findall(r"`([\w./]+(?:\.py|\.md|\.toml|/))`", text))
    tracked = "\n".join(f"/{path.relative_to(ROOT)}" for path in tracked_files())
    assert len(named) > 40
    assert sorted(name for name in named if f"/{name}" not in tracked) == []


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and line[0] not in "#-")


def test_the_wheels_for_a_gpu_are_those_for_the_cpu_but_torch_and_triton() -> None:
    """Torch for CUDA 13.0 pins its Triton: the pair that the measurements were made with."""
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert (cuda.pop("torch"), cuda.pop("triton")) == ("2.11.0", "3.6.0")
    del cpu["torch"]
    assert cuda == cpu
    assert pins("triton.txt")["numpy"] == cpu["numpy"]


def test_the_hashed_wheels_are_those_for_the_cpu() -> None:
    hashed = {name: pin.split()[0] for name, pin in pins("cpu.hashed.txt").items()}
    cpu = pins("cpu.txt")
    del cpu["torch"]  # from an index of its own
    assert hashed.items() >= cpu.items()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "requirements/cpu.txt"),
        ("cuda", "requirements/cuda.txt"),
        ("tpu", "expected cpu or"),
    ],
)
def test_make_setup_takes_the_device(device: str, message: str, tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    done = subprocess.run(
        [make, "-n", "setup", f"DEVICE={device}", f"VENV={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert message in (done.stdout + done.stderr), done.stderr
    assert done.returncode == (0 if device != "tpu" else 2)
