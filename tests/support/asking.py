"""Asking an engine directory through run.py, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.command import RUN, refused, run_command

Images = Callable[[str], Path]


def ask(engine_dir: Path, *flags: object) -> tuple[object, ...]:
    return ("--engine_dir", engine_dir, "--device", "cpu", "--max_new_tokens", "2", *flags)


def run_refused(
    engine_dir: Path, root: Path, *flags: object, fragments: tuple[str, ...] = ()
) -> str:
    return refused(root, RUN, *ask(engine_dir, *flags), fragments=fragments)


def answered(engine_dir: Path, *flags: object) -> dict[str, Any]:
    result = run_command(RUN, *ask(engine_dir, *flags, "--json"))
    assert result.exit_code == 0, result.stderr
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def batch(
    engine_dir: Path, folder: Path, lines: list[dict[str, Any]], exit_code: int | None = 0
) -> list[dict[str, Any]]:
    """Answer lines to request lines, from a fresh output file."""
    input_file, output_file = folder / "requests.jsonl", folder / "answers.jsonl"
    input_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output_file.unlink(missing_ok=True)
    files = ("--input_file", input_file, "--output_file", output_file)
    result = run_command(RUN, *ask(engine_dir, *files))
    assert exit_code is None or result.exit_code == exit_code, result.stderr
    return [json.loads(line) for line in output_file.read_text().split("\n")[:-1]]
