"""The table of the slowest tests, from a JUnit file whose figures are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvlm.program.errors import UserError
from tests.support.command import ROOT
from tools import slowest_tests
from tools.slowest_tests import BUDGET_S, MAX_MINUTES, WORKERS, page, read, rooms

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.inputs.test_tiling" name="test_a[1|2]" time="2.5">
  <properties><property name="check" value="yes" /></properties></testcase>
<testcase classname="tests.inputs.test_prompt.TestTags" name="test_b" time="100.25" />
<testcase classname="tests.test_project" name="test_c" time="7.0"><failure /></testcase>
<testcase classname="tests.ranks.test_world" name="test_d" time="50.0"><skipped /></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def junit(tmp_path: Path) -> Path:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    return path


def test_rooms_add_up_what_ran(junit: Path) -> None:
    found = {
        room.name: (room.num_tests, room.seconds, room.check_seconds) for room in rooms(read(junit))
    }
    assert found == {"inputs": (2, 102.75, 2.5), "project": (1, 7.0, 0.0)}


def test_the_page_lists_the_slowest_first_and_says_what_is_over(junit: Path) -> None:
    lines = list(page(read(junit)))
    assert f"| inputs | 2 | 102.8 | {BUDGET_S['inputs']} (over) | 2.5 |" in lines
    assert lines[-3:] == [
        "| 100.2 | tests.inputs.test_prompt.TestTags::test_b |  |",
        "| 7.0 | tests.test_project::test_c |  |",
        "| 2.5 | tests.inputs.test_tiling::test_a[1\\|2] | yes |",
    ]


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--strict",), 1)])
def test_a_room_over_its_budget_fails_only_when_asked(
    junit: Path,
    flags: tuple[str, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = junit.parent / "page.md"
    monkeypatch.setattr("sys.argv", ["slowest_tests", str(junit), "--output", str(output), *flags])
    assert slowest_tests.main() == code
    assert capsys.readouterr().err.splitlines() == [
        f"inputs: 102.8 s, budget {BUDGET_S['inputs']} s"
    ]
    assert output.read_text().endswith("| yes |\n")


@pytest.mark.parametrize("text", ["<testsuites", "<testsuites></testsuites>", None])
def test_a_file_without_results_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "junit.xml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="pytest --junitxml"):
        read(path)


def test_every_room_has_a_budget_and_all_fit_into_make_test() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders | {"project"} == set(BUDGET_S)
    assert sum(BUDGET_S.values()) <= MAX_MINUTES * 60 * WORKERS
