"""The whole path on the small trained model: convert, build, and read pictures drawn just now.

    python -m tools.demo [--seed N]

Runs the three programs one after another in one process (importing torch takes longer than the
work) and prints each command as a user would type it.
"""

from __future__ import annotations

import json
import random
import secrets
import shlex
import sys
from pathlib import Path

import build_engine
import convert_checkpoint
import run
from nvlm.inputs.tiling import Grid
from nvlm.program import command_line
from tools.tiny.evaluation import draw_sample

MODEL = Path("models/nvlm-d-tiny")
FOLDER = Path("work/demo")
DRAWN = ("number", "word", "two_lines", "colour", "tile_shows", "which_tile", "count", "text")
SCANS = (
    ("examples/scan_1642.png", "Read the number.", "1642"),
    ("examples/scan_petition.png", "Read the word.", "Petition"),
    ("examples/photo_markers.png", "Please read the word in the image.", "markers"),
    ("examples/photo_region.png", "What does it say?", "Region"),
)


def call(module: object, name: str, *flags: str) -> None:
    """Calls the program's `main` with these flags."""
    print(f"$ python {name}.py {shlex.join(flags)}", file=sys.stderr, flush=True)
    sys.argv = [f"{name}.py", *flags]
    code = module.main()  # type: ignore[attr-defined]
    assert not code, f"{name} ended with {code}"


def write_requests(seed: int) -> dict[str, tuple[str, str, str]]:
    """Draws the pictures and writes requests.jsonl; (picture, question, expected) by id."""
    asked: dict[str, tuple[str, str, str]] = {}
    lines = []
    for index, task in enumerate(DRAWN):
        sample = draw_sample(task, index, random.Random(f"{seed}-{task}"))
        picture = ""
        if sample.image is not None:
            picture = f"{task}.png"
            sample.image.save(FOLDER / picture)
        asked[task] = (picture, sample.question, sample.answer)
        line = {"id": task, "prompt": sample.question, "system": sample.system}
        line |= {"prompt_format": sample.prompt_format}
        lines.append(line | ({"images": [picture]} if picture else {}))
    for scan, question, expected in SCANS:
        name = Path(scan).stem
        asked[name] = (scan, question, expected)
        lines.append({"id": name, "prompt": question, "images": [str(Path(scan).resolve())]})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (FOLDER / "requests.jsonl").write_text(text)
    return asked


def draw_grid(grid: Grid) -> str:
    """The tiles of an image as the model gets them, a line per row of the grid."""
    columns, rows = grid
    first = [row * columns + 1 for row in range(rows)]
    lines = ["".join(f"[{start + column}]" for column in range(columns)) for start in first]
    if columns * rows > 1:
        lines[-1] += " and the thumbnail"
    return "".join(f"    {line}\n" for line in lines)


def make_engine() -> tuple[str, ...]:
    """Converts and builds what is not up to date; returns the flags that name the engine."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint, engine = (str(FOLDER / name) for name in ("checkpoint", "engine"))
    convert = ("--model_dir", str(MODEL), "--output_dir", checkpoint, "--if_stale")
    call(convert_checkpoint, "convert_checkpoint", *convert)
    place = ("--engine_dir", engine, "--device", "cpu")
    several = ("--max_num_images", "3")  # a conversation on the page shows more than one
    build = ("--checkpoint_dir", checkpoint, *place, *several, "--if_stale")
    call(build_engine, "build_engine", *build)
    return place


def main() -> None:
    parser = command_line.ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, help="draw the pictures of this seed again")
    parser.add_argument("--engine_only", action="store_true", help="make the engine, ask nothing")
    arguments = parser.parse_args()
    place = make_engine()
    if arguments.engine_only:
        return
    given = arguments.seed
    seed = secrets.randbelow(10**6) if given is None else given
    asked = write_requests(seed)
    requests, answers = FOLDER / "requests.jsonl", FOLDER / "answers.jsonl"
    answers.unlink(missing_ok=True)
    batch = ("--input_file", str(requests), "--output_file", str(answers))
    call(run, "run", *place, *batch, "--max_new_tokens", "24")

    print(f"\nPictures of seed {seed}, in {FOLDER}; pieces of two printed pages, in examples.\n")
    right = 0
    for line in map(json.loads, answers.read_text().splitlines()):
        picture, question, expected = asked[line["id"]]
        is_right = line["text"] == expected
        right += is_right
        tiles = "".join(draw_grid((columns, rows)) for columns, rows in line["grids"])
        answer = " | ".join(line["text"].splitlines())
        verdict = "right" if is_right else f"wrong, it is {' | '.join(expected.splitlines())}"
        print(f"{picture or 'no picture'}\n{tiles}    {question}\n    -> {answer}   ({verdict})\n")
    print(f"{right} of {len(asked)} answers are right.\n")
    scan, question, _ = SCANS[1]
    ask = (*place, "--image", scan, "--prompt", question)
    call(run, "run", *ask, "--show_tiles", str(FOLDER / "tiles.png"))
    print(f"{FOLDER}/tiles.png shows the tiles that the model saw.")


if __name__ == "__main__":
    command_line.run(main)
