"""The slowest tests, and every room's seconds beside its budget, as a page of Markdown.

    python -m pytest -n 2 --dist loadfile --junitxml JUNIT
    python -m tools.slowest_tests JUNIT [--output PAGE] [--strict]

`make durations` does both and writes tests/durations.md. The seconds of a test hold its fixtures;
a fixture that many tests share counts for the first of them. tests/conftest.py writes into the
file which tests `make check` runs.
"""

from __future__ import annotations

import os
import platform
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nvlm.program.command_line import ArgumentParser, run
from nvlm.program.errors import UserError

NUM_SLOWEST = 30
WORKERS = 2
MAX_MINUTES = 12
"""`make test` stays below, on two cores."""

BUDGET_S = {
    "answers": 5,
    "bench": 120,
    "commands": 230,
    "decoder": 160,
    "evaluation": 70,
    "faults": 60,
    "formats": 20,
    "frontends": 235,
    "fuzz": 10,
    "inputs": 60,
    "making": 140,
    "model": 10,
    "planning": 5,
    "project": 15,
    "ranks": 175,
    "requests": 5,
    "serving": 40,
    "tools": 70,
    "vision": 10,
}
"""Seconds of one worker for the tests of a folder; "project" is the files beside the folders."""


@dataclass(frozen=True, slots=True)
class Test:
    name: str
    """As a module and a name: tests.inputs.test_prompt::test_tags."""
    room: str
    seconds: float
    in_check: bool


@dataclass(frozen=True, slots=True)
class Room:
    name: str
    num_tests: int
    seconds: float
    check_seconds: float

    @property
    def budget_s(self) -> int:
        return BUDGET_S.get(self.name, 0)

    @property
    def is_over(self) -> bool:
        return self.seconds > self.budget_s


def read(path: Path) -> list[Test]:
    """The tests of a JUnit file of pytest, slowest first, without those that were skipped."""
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except (OSError, ET.ParseError) as error:
        raise UserError(
            f"{path} is not a JUnit file ({error}); write one with pytest --junitxml {path}"
        ) from None
    tests = [_test(case) for case in cases if case.find("skipped") is None]
    if not tests:
        raise UserError(f"{path} holds no test that ran; write one with pytest --junitxml {path}")
    return sorted(tests, key=lambda test: (-test.seconds, test.name))


def _test(case: ET.Element) -> Test:
    module, name = case.attrib["classname"], case.attrib["name"]
    folder = module.split(".")[1]
    return Test(
        f"{module}::{name}",
        "project" if folder.startswith("test_") else folder,
        float(case.attrib["time"]),
        any(entry.attrib["name"] == "check" for entry in case.iter("property")),
    )


def rooms(tests: Sequence[Test]) -> list[Room]:
    """The rooms in the order of their names."""
    made = []
    for name in sorted({test.room for test in tests}):
        inside = [test for test in tests if test.room == name]
        seconds = sum(test.seconds for test in inside)
        check_seconds = sum(test.seconds for test in inside if test.in_check)
        made.append(Room(name, len(inside), seconds, check_seconds))
    return made


def page(tests: Sequence[Test]) -> Iterator[str]:
    """The lines of tests/durations.md."""
    measured = rooms(tests)
    yield "# How long the tests take"
    yield ""
    yield (
        f"Written by `make durations` with {os.cpu_count()} cores, Python"
        f" {platform.python_version()} and torch {torch.__version__}. Seconds are those of one"
        f" worker; `make test` has {WORKERS}. Budgets stand in tools/slowest_tests.py."
    )
    yield ""
    yield "| room | tests | seconds | budget | of these in `make check` |"
    yield "|---|---:|---:|---:|---:|"
    for room in measured:
        over = " (over)" if room.is_over else ""
        yield (
            f"| {room.name} | {room.num_tests} | {room.seconds:.1f} | {room.budget_s}{over}"
            f" | {room.check_seconds:.1f} |"
        )
    yield (
        f"| all | {len(tests)} | {sum(room.seconds for room in measured):.1f}"
        f" | {sum(room.budget_s for room in measured)}"
        f" | {sum(room.check_seconds for room in measured):.1f} |"
    )
    yield ""
    yield f"## The {NUM_SLOWEST} slowest"
    yield ""
    yield "| seconds | test | in `make check` |"
    yield "|---:|---|---|"
    for test in tests[:NUM_SLOWEST]:
        name = test.name.replace("|", "\\|")
        yield f"| {test.seconds:.1f} | {name} | {'yes' if test.in_check else ''} |"


def main() -> int:
    """1 with `--strict` when a room is over its budget, else 0."""
    parser = ArgumentParser("The slowest tests, and every room's seconds beside its budget.")
    parser.add_argument("junit", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--output", type=Path, help="write the page there, not to stdout")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 when a room is over its budget"
    )
    args = parser.parse_args()

    tests = read(args.junit)
    text = "\n".join(page(tests)) + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)
    over = [room for room in rooms(tests) if room.is_over]
    for room in over:
        print(f"{room.name}: {room.seconds:.1f} s, budget {room.budget_s} s", file=sys.stderr)
    return 1 if over and args.strict else 0


if __name__ == "__main__":
    run(main)
