"""Held-out questions for the small model: pictures drawn by Pillow, fonts and strings it never saw.

    python -m tools.tiny.evaluation --write D [--per_task N]       requests.jsonl and pictures
    python -m tools.tiny.evaluation --score answers.jsonl          share of right answers by task

Shares no code with the training compositor. A question is right when the answer is exactly the
expected string. Everything hangs on SEED, the fonts in fonts/ and words.txt.
"""

from __future__ import annotations

import colorsys
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from nvlm.inputs.prompt import DEFAULT_SYSTEM
from nvlm.inputs.tiling import Grid, candidate_grids, choose_grid
from nvlm.program.command_line import ArgumentParser, positive_int, run
from nvlm.program.errors import UserError
from tools.tiny import questions
from tools.tiny.fonts import evaluation_font_files
from tools.tiny.words import held_out_words, training_words

SEED = 20261123
TASKS = ("number", "word", "two_lines", "colour", "which_tile", "tile_shows", "count", "text")
TILE_SIZE = 224
MIN_EM = 24
"""Pixels of an em after the picture was stretched over its tiles."""
MAX_EM = 160

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    id: str
    question: str
    answer: str
    image: Image.Image | None
    prompt_format: str
    system: str

    @property
    def task(self) -> str:
        return self.id.rsplit("-", 1)[0]


def samples(task: str, number: int) -> Iterator[Sample]:
    """The first `number` samples of a task; each depends on SEED, the task and its index only."""
    for index in range(number):
        yield draw_sample(task, index, random.Random(f"{SEED}-{task}-{index}"))


def draw_sample(task: str, index: int, rng: random.Random) -> Sample:
    """A fresh question of one of TASKS; all that is random about it comes from `rng`."""
    image: Image.Image | None = None
    if task == "text":
        question, answer = _text_only(rng)
    elif task == "count":
        image, question, answer = _count(rng)
    elif task in ("which_tile", "tile_shows"):
        image, question, answer = _tile_digits(task, rng)
    else:
        image, question, answer = _printed(task, rng)
    megatron = rng.random() < 0.5
    return Sample(
        f"{task}-{index}",
        question,
        answer,
        image,
        "megatron" if megatron else "hf",
        "Follow the user's instruction and answer questions."
        if megatron and rng.random() < 0.5
        else DEFAULT_SYSTEM,
    )


def _number(rng: random.Random, max_length: int) -> str:
    length = rng.randint(1, max_length)
    return "".join(rng.choice("0123456789") for _ in range(length))


def _word(rng: random.Random, max_length: int) -> str:
    word = rng.choice([word for word in held_out_words() if len(word) <= max_length])
    return rng.choice((word, word, word.capitalize(), word.upper()))


def _printed(task: str, rng: random.Random) -> tuple[Image.Image, str, str]:
    canvas = _Canvas.draw_on(rng.choice(candidate_grids(6)), rng)
    if task == "two_lines":
        lines = [_number(rng, 6) if rng.random() < 0.5 else _word(rng, 6) for _ in range(2)]
        middle = canvas.image.height * rng.uniform(0.4, 0.6)
        name, ink = canvas.ink(rng)
        canvas.print(lines[0], ink, rng, (0, 0, canvas.image.width, middle))
        canvas.print(lines[1], ink, rng, (0, middle, canvas.image.width, canvas.image.height))
        return canvas.finish(rng), rng.choice(questions.TWO_LINES), "\n".join(lines)
    is_number = task == "number" or (task == "colour" and rng.random() < 0.5)
    text = _number(rng, 8) if is_number else _word(rng, 8)
    name, ink = canvas.ink(rng)
    canvas.print(text, ink, rng, (0, 0, *canvas.image.size))
    wordings = {
        "number": questions.NUMBER,
        "word": questions.WORD,
        "colour": questions.COLOUR,
    }[task]
    return canvas.finish(rng), rng.choice(wordings), name if task == "colour" else text


def _tile_digits(task: str, rng: random.Random) -> tuple[Image.Image, str, str]:
    grid = rng.choice([grid for grid in candidate_grids(6) if grid != (1, 1)])
    canvas = _Canvas.draw_on(grid, rng)
    columns, rows = grid
    width, height = canvas.image.width / columns, canvas.image.height / rows
    digits = rng.sample("0123456789", columns * rows)
    _, ink = canvas.ink(rng)
    font_file = rng.choice(evaluation_font_files())
    for tile, digit in enumerate(digits):
        x, y = tile % columns * width, tile // columns * height
        canvas.print(digit, ink, rng, (x, y, x + width, y + height), font_file, 48)
    tile = rng.randrange(columns * rows)
    values = {"tile": tile + 1, "digit": digits[tile]}
    if task == "which_tile":
        question = rng.choice(questions.WHICH_TILE).format(**values)
        return canvas.finish(rng), question, questions.WHICH_TILE_ANSWER.format(**values)
    return canvas.finish(rng), rng.choice(questions.TILE_SHOWS).format(**values), digits[tile]


def _count(rng: random.Random) -> tuple[Image.Image, str, str]:
    """One to six shapes; each in a cell of its own of a 3 x 3 grid."""
    canvas = _Canvas.draw_on(rng.choice(candidate_grids(6)), rng)
    width, height = canvas.image.width / 3, canvas.image.height / 3
    kinds = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
    for kind, cell in zip(kinds, rng.sample(range(9), len(kinds)), strict=True):
        radius = rng.uniform(0.2, 0.42) * min(width, height)
        x = (cell % 3) * width + rng.uniform(radius, width - radius)
        y = (cell // 3) * height + rng.uniform(radius, height - radius)
        canvas.shape(kind, (x, y), radius, canvas.ink(rng)[1], rng)
    asked = rng.randrange(4)
    name = (*questions.SHAPES, questions.ANY_SHAPE)[asked]
    count = len(kinds) if asked == 3 else kinds.count(asked)
    return canvas.finish(rng), rng.choice(questions.COUNT).format(shape=name), str(count)


def _text_only(rng: random.Random) -> tuple[str, str]:
    kind = rng.randrange(4)
    if kind < 2:
        text = _number(rng, 8) if kind else _word(rng, 8)
        return rng.choice(questions.COPY).format(text=text), text
    a, b = sorted((rng.randrange(10), rng.randrange(10)), reverse=True)
    wordings = questions.SUM if kind == 2 else questions.DIFFERENCE
    return rng.choice(wordings).format(a=a, b=b), str(a + b if kind == 2 else a - b)


@dataclass(slots=True)
class _Canvas:
    """A picture that the tiling will cut into `grid`; its own size and aspect vary."""

    image: Image.Image
    background: list[Colour]
    scale: tuple[float, float]  # stretched pixels for each of its own, in x and y

    @classmethod
    def draw_on(cls, grid: Grid, rng: random.Random) -> _Canvas:
        columns, rows = grid
        while True:
            zoom, stretch = rng.uniform(0.75, 1.6), rng.uniform(0.92, 1.08)
            size = (
                round(columns * TILE_SIZE * zoom * stretch),
                round(rows * TILE_SIZE * zoom / stretch),
            )
            if choose_grid(*size, TILE_SIZE, 6) == grid:
                break
        base = rng.randrange(256)
        colour = (base, base, base)
        if rng.random() < 0.5:
            colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        other = tuple(max(0, min(255, value + rng.randint(-25, 25))) for value in colour)
        ends = [colour, (other[0], other[1], other[2])]
        image = Image.new("RGB", size, ends[0])
        ramp = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
        image.paste(Image.new("RGB", size, ends[1]), mask=ramp)
        scale = (columns * TILE_SIZE / size[0], rows * TILE_SIZE / size[1])
        return cls(image, ends, scale)

    def ink(self, rng: random.Random) -> tuple[str, Colour]:
        """A named colour that stands out from the background."""
        while True:
            name = rng.choice(list(questions.COLOURS))
            hue, saturation, value = (rng.uniform(*r) for r in questions.COLOURS[name])
            red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
            colour = (round(255 * red), round(255 * green), round(255 * blue))
            differences = [abs(_luma(colour) - _luma(end)) for end in self.background]
            channels = [
                max(abs(a - b) for a, b in zip(colour, end, strict=True)) for end in self.background
            ]
            if min(differences) > 60 and min(channels) > 80:
                return name, colour

    def print(
        self,
        text: str,
        ink: Colour,
        rng: random.Random,
        box: tuple[float, float, float, float],
        font_file: Path | None = None,
        min_em: int = MIN_EM,
    ) -> None:
        """Prints `text` somewhere in the box (left, top, right, bottom), wholly inside."""
        font_file = font_file or rng.choice(evaluation_font_files())
        unit = ImageFont.truetype(font_file, 100)
        left, top, right, bottom = unit.getbbox(text)
        room = (box[2] - box[0] - 6, box[3] - box[1] - 6)
        largest = 100 * min(room[0] / (right - left), room[1] / (bottom - top))
        scale = min(self.scale)
        low, high = min(min_em / scale, largest), min(MAX_EM / scale, largest)
        size = max(6, math.floor(math.exp(rng.uniform(math.log(low), math.log(max(low, high))))))
        font = ImageFont.truetype(font_file, size)
        left, top, right, bottom = font.getbbox(text)
        x = rng.uniform(box[0] + 2, max(box[0] + 2, box[2] - 2 - (right - left)))
        y = rng.uniform(box[1] + 2, max(box[1] + 2, box[3] - 2 - (bottom - top)))
        ImageDraw.Draw(self.image).text((x - left, y - top), text, ink, font)

    def shape(
        self,
        kind: int,
        centre: tuple[float, float],
        radius: float,
        ink: Colour,
        rng: random.Random,
    ) -> None:
        draw = ImageDraw.Draw(self.image)
        if kind == 0:
            draw.circle(centre, radius, ink)
            return
        corners = 4 if kind == 1 else 3
        draw.regular_polygon((*centre, radius), corners, rng.randrange(360), ink)

    def finish(self, rng: random.Random) -> Image.Image:
        """Some pictures are a little out of focus."""
        if rng.random() < 0.3:
            return self.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))
        return self.image


def _luma(colour: Colour) -> float:
    """ITU-R BT.601."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def write_requests(directory: Path, per_task: int) -> Path:
    """Writes pictures and requests.jsonl for run.py; returns the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for task in TASKS:
        for sample in samples(task, per_task):
            line: dict[str, object] = {
                "id": sample.id,
                "prompt": sample.question,
                "system": sample.system,
            }
            line |= {"prompt_format": sample.prompt_format, "max_new_tokens": 20}
            if sample.image is not None:
                sample.image.save(directory / f"{sample.id}.png")
                line["images"] = [f"{sample.id}.png"]
            lines.append(json.dumps(line) + "\n")
    path = directory / "requests.jsonl"
    path.write_text("".join(lines))
    return path


def may_be_cut(sample: Sample) -> bool:
    """Whether a word of its answer begins a training word, which training may have cut to it."""
    words = [word for word in sample.answer.lower().split() if word.isalpha()]
    return any(longer.startswith(word) for word in words for longer in training_words())


def score(answers: Path, is_asked: Callable[[Sample], bool] = lambda _: True) -> dict[str, float]:
    """Share of exactly right answers by task, of run.py's output file, over the samples asked for.
    Raises `UserError` for a file that does not answer `write_requests`."""
    given: dict[str, dict[int, str]] = defaultdict(dict)
    try:
        lines = answers.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{answers} cannot be read ({error}); give run.py's output file") from None
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            task, index = line["id"].rsplit("-", 1)
            given[task][int(index)] = line.get("text", "")
            is_ours = task in TASKS and index.isdecimal()
        except (ValueError, TypeError, KeyError, AttributeError):
            is_ours = False
        if not is_ours:
            raise UserError(
                f"{answers}, line {number} answers none of this evaluation's questions; give the "
                "output of run.py for the requests that --write wrote"
            )
    scores = {}
    for task, texts in given.items():
        asked = enumerate(samples(task, max(texts) + 1))
        hits = [texts[i] == sample.answer for i, sample in asked if i in texts and is_asked(sample)]
        if hits:
            scores[task] = sum(hits) / len(hits)
    return scores


def main() -> None:
    parser = ArgumentParser((__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="folder for requests and pictures")
    parser.add_argument("--per_task", type=positive_int, default=100)
    parser.add_argument("--score", type=Path, help="run.py's output file")
    arguments = parser.parse_args()
    if not arguments.write and not arguments.score:
        raise UserError("give --write, --score or both")
    if arguments.write:
        print(write_requests(arguments.write, arguments.per_task))
    if arguments.score:
        print(json.dumps(score(arguments.score), indent=2))
        uncut = score(arguments.score, lambda sample: not may_be_cut(sample))
        shares = ", ".join(
            f"{task} {uncut[task]:.2f}" for task in ("word", "two_lines") if task in uncut
        )
        print(f"without words that begin a training word: {shares}")


if __name__ == "__main__":
    run(main)
