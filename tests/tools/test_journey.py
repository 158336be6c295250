"""tools/journey.py on a program whose calls are known."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT

RUN = """
import threading
from first import ask, tile

def main():
    ask()
    ask()
    thread = threading.Thread(target=tile)
    thread.start()
    thread.join()
    print("the answer")

main()
"""
FIRST = """
from second import answer

def ask():
    answer()
    answer()

def tile():
    pass
"""


@pytest.mark.process
def test_calls_and_changes_of_file_are_counted_in_all_threads(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text("def answer():\n    pass\n")
    command = [sys.executable, str(ROOT / "tools" / "journey.py"), "--engine_dir", "engine"]
    done = subprocess.run(
        [*command, "--checkout", str(tmp_path), "--list"],
        capture_output=True,
        text=True,
        check=True,
    )
    # twice first.ask, second.answer, second.answer; first.tile in its own thread
    assert done.stdout.splitlines() == [
        "files 2, changes of file 5, calls 7",
        "      3 first.py",
        "      4 second.py",
    ]
    assert "the answer" in done.stderr
