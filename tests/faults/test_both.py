"""`make soak`: both servers at the same time, and a fault of either is the whole's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.both import run_together
from tests.support.command import ROOT

MEETING = """
import sys, time
from pathlib import Path

mine, others, code = sys.argv[1:]
Path(mine).touch()
end = time.monotonic() + 120
while not Path(others).exists():
    if time.monotonic() > end:
        sys.exit(9)
    time.sleep(0.02)
print(f'{{"found": "{Path(mine).name}"}}')
sys.exit(int(code))
"""


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 1)], ids=str)
def test_both_run_at_once_and_report_what_they_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], codes: tuple[int, int]
) -> None:
    """Neither ends before the other has begun."""
    a, b = tmp_path / "a", tmp_path / "b"
    program = (sys.executable, "-c", MEETING)
    commands = {
        "one": (*program, str(a), str(b), str(codes[0])),
        "two": (*program, str(b), str(a), str(codes[1])),
    }
    assert run_together(commands) == max(codes)
    assert capfd.readouterr().out == 'one: {"found": "a"}\ntwo: {"found": "b"}\n'


def test_make_soak_runs_both() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nsoak: ")[2].partition("\n\n")[0]
    assert "-m tests.faults.both" in recipe
    assert recipe.count("--minutes $(MINUTES)") == 1
