"""The whole path on a tiny model of random weights: make it, convert, build, ask about a photo.

Runs the three programs one after another in one process (importing torch takes longer than the
work) and prints each command as a user would type it.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import build_engine
import convert_checkpoint
import run
from nvlm import command_line
from tools.make_random_checkpoint import PRESETS, write_random_checkpoint

FOLDER = Path("work/demo")
PHOTO, QUESTION = "examples/coffee.jpg", "What is in the cup?"


def call(module: object, name: str, *flags: str) -> None:
    """Calls the program's `main` with these flags."""
    print(f"$ python {name}.py {shlex.join(flags)}", file=sys.stderr, flush=True)
    sys.argv = [f"{name}.py", *flags]
    code = module.main()  # type: ignore[attr-defined]
    assert not code, f"{name} ended with {code}"


def main() -> None:
    model, checkpoint, engine = (str(FOLDER / name) for name in ("model", "checkpoint", "engine"))
    if not (FOLDER / "model" / "config.json").is_file():
        write_random_checkpoint(FOLDER / "model", PRESETS["demo"])
    convert = ("--model_dir", model, "--output_dir", checkpoint, "--if_stale")
    call(convert_checkpoint, "convert_checkpoint", *convert)
    place = ("--engine_dir", engine, "--device", "cpu")
    build = ("--checkpoint_dir", checkpoint, *place, "--if_stale")
    call(build_engine, "build_engine", *build)
    ask = (*place, "--image", PHOTO, "--prompt", QUESTION)
    call(run, "run", *ask, "--max_new_tokens", "24", "--json")


if __name__ == "__main__":
    command_line.run(main)
