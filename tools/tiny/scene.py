"""Random training scenes as numbers: what is drawn where, what is asked and what is right.

Lengths are pixels of the canvas, the image as the tiling stretches it over its grid. NumPy only;
`compositor` turns a `SceneBatch` into pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from nvlm.inputs.tiling import Grid
from tools.tiny import questions
from tools.tiny.atlas import CHARACTERS, NUM_DIGITS
from tools.tiny.words import training_words

MAX_CHARACTERS = 8
MAX_SHAPES = 6
MIN_EM = 15.0
FAR = 1e4
"""Em; where a line's absent characters begin."""

Ink = tuple[int, NDArray[np.float32]]
"""Index of the colour's name, and the colour."""

_COLOUR_SHARE = 0.2  # of the questions on one line
_WHICH_TILE_SHARE = 0.7  # of the questions on tiles


@dataclass(slots=True)
class Lines:
    """One printed line per row of each array, N rows; `empty` rows draw nothing.

    characters [N, 8] index CHARACTERS, after the last -1; starts [N, 9] em of each character's
    left edge, the line's end after the last, then FAR; centre [N, 2] (x, y); em [N, 2] pixels of
    an em in x and y; angle [N] radians; font [N]; colour [N, 3] in 0..1; colour_name [N] indexes
    questions.COLOURS.
    """

    characters: NDArray[np.int64]
    starts: NDArray[np.float32]
    centre: NDArray[np.float32]
    em: NDArray[np.float32]
    angle: NDArray[np.float32]
    font: NDArray[np.int64]
    colour: NDArray[np.float32]
    colour_name: NDArray[np.int64]

    @classmethod
    def empty(cls, num_lines: int) -> Lines:
        return cls(
            np.full((num_lines, MAX_CHARACTERS), -1, np.int64),
            np.full((num_lines, MAX_CHARACTERS + 1), FAR, np.float32),
            np.zeros((num_lines, 2), np.float32),
            np.ones((num_lines, 2), np.float32),
            np.zeros(num_lines, np.float32),
            np.zeros(num_lines, np.int64),
            np.zeros((num_lines, 3), np.float32),
            np.zeros(num_lines, np.int64),
        )


@dataclass(slots=True)
class Shapes:
    """kind [N, 6] indexes questions.SHAPES, -1 draws nothing; centre [N, 6, 2]; radius, angle."""

    kind: NDArray[np.int64]
    centre: NDArray[np.float32]
    radius: NDArray[np.float32]
    angle: NDArray[np.float32]
    colour: NDArray[np.float32]

    @classmethod
    def empty(cls, num_scenes: int) -> Shapes:
        shape = (num_scenes, MAX_SHAPES)
        return cls(
            np.full(shape, -1, np.int64),
            np.zeros((*shape, 2), np.float32),
            np.ones(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros((*shape, 3), np.float32),
        )


@dataclass(slots=True)
class SceneBatch:
    """Scenes of one grid. `lines` is [first lines of all scenes, second lines of all scenes].

    Scenes come in blocks so that each pass of the compositor runs over what needs it:
    `num_two_lines` scenes with two lines, then one line up to `num_text`, then single digits, one
    line per tile (`tile_lines`, row by row of the grid), then shapes.
    """

    grid: Grid
    lines: Lines
    num_two_lines: int
    num_text: int
    tile_lines: Lines
    shapes: Shapes
    background: NDArray[np.float32]  # [B, 2, 3]: the two ends of the background's gradient
    blur: float  # how many times coarser the picture was than the canvas
    task: list[str] = field(default_factory=list)
    question: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)


class SceneSampler:
    """Draws scenes. `advances` [fonts, characters] em; `fonts` are the rows that may be used."""

    def __init__(
        self,
        advances: NDArray[np.float32],
        has_lower_case: NDArray[np.bool_],
        fonts: NDArray[np.int64],
        tile_size: int,
        generator: Generator,
    ) -> None:
        self.advances = advances
        self.has_lower_case = has_lower_case
        self.fonts = fonts
        self.tile_size = tile_size
        self.random = generator
        self.max_length = MAX_CHARACTERS

    def scenes(self, grid: Grid, num_scenes: int) -> SceneBatch:
        """Questions about images on `grid`; tile questions only where there are several tiles."""
        num_tiles = grid[0] * grid[1]
        num_two_lines = round(0.17 * num_scenes)
        num_shapes = round(0.09 * num_scenes)
        num_tile_scenes = round(0.2 * num_scenes) if num_tiles > 1 else 0
        num_text = num_scenes - num_shapes - num_tile_scenes
        batch = SceneBatch(
            grid,
            Lines.empty(2 * num_scenes),
            num_two_lines,
            num_text,
            Lines.empty(num_tile_scenes * num_tiles),
            Shapes.empty(num_scenes),
            np.zeros((num_scenes, 2, 3), np.float32),
            1.0 if self.random.random() < 0.6 else float(self.random.uniform(1.0, 3.2)),
        )
        for index in range(num_scenes):
            if index < num_two_lines:
                self._two_lines(batch, index)
            elif index < num_text:
                self._one_line(batch, index)
            elif index < num_text + num_tile_scenes:
                self._tile_digits(batch, index, index - num_text)
            else:
                self._shapes(batch, index)
        return batch

    def pages(self, num_pages: int, num_lines: int) -> SceneBatch:
        """Single tiles full of text, for learning letters alone. lines: [num_lines, pages]."""
        batch = SceneBatch(
            (1, 1),
            Lines.empty(num_lines * num_pages),
            0,
            num_pages,
            Lines.empty(0),
            Shapes.empty(num_pages),
            np.zeros((num_pages, 2, 3), np.float32),
            1.0 if self.random.random() < 0.6 else float(self.random.uniform(1.0, 2.5)),
        )
        band = self.tile_size / num_lines
        for page in range(num_pages):
            ink = self._colours(batch, page)
            for k in range(num_lines):
                text, font = self._text(1)
                row = k * num_pages + page
                self._place(
                    batch.lines, row, text, font, ink, batch.blur, (0.0, k * band),
                    (float(self.tile_size), band),
                )  # fmt: skip
        return batch

    def _two_lines(self, batch: SceneBatch, index: int) -> None:
        num_scenes = len(batch.background)
        columns, rows = batch.grid
        width, height = columns * self.tile_size, rows * self.tile_size
        ink = self._colours(batch, index)
        middle = height * self.random.uniform(0.35, 0.65)
        first, font = self._text(1, max_length=6)
        second, other_font = self._text(1, max_length=6)
        if self.random.random() < 0.7:
            other_font = font if second.islower() <= self.has_lower_case[font] else other_font
        area = (width, middle), (width, height - middle)
        self._place(batch.lines, index, first, font, ink, batch.blur, (0.0, 0.0), area[0])
        self._place(
            batch.lines, num_scenes + index, second, other_font, ink, batch.blur,
            (0.0, middle), area[1],
        )  # fmt: skip
        self._ask(batch, "two_lines", questions.TWO_LINES, f"{first}\n{second}")

    def _one_line(self, batch: SceneBatch, index: int) -> None:
        columns, rows = batch.grid
        text, font = self._text(1)
        ink = self._colours(batch, index)
        area = (columns * self.tile_size, rows * self.tile_size)
        self._place(batch.lines, index, text, font, ink, batch.blur, (0.0, 0.0), area)
        if self.random.random() < _COLOUR_SHARE:
            self._ask(batch, "colour", questions.COLOUR, list(questions.COLOURS)[ink[0]])
        elif text.isdigit():
            self._ask(batch, "number", questions.NUMBER, text)
        else:
            self._ask(batch, "word", questions.WORD, text)

    def _tile_digits(self, batch: SceneBatch, index: int, nth: int) -> None:
        """A different digit in each tile."""
        num_tiles = batch.grid[0] * batch.grid[1]
        ink = self._colours(batch, index)
        digits = self.random.permutation(10)[:num_tiles]
        font = int(self.random.choice(self.fonts))
        size = float(self.tile_size)
        for tile, digit in enumerate(digits):
            row = nth * num_tiles + tile
            text = str(digit)
            self._place(
                batch.tile_lines, row, text, font, ink, batch.blur, (0.0, 0.0), (size, size), 0.8
            )
        tile = int(self.random.integers(num_tiles))
        values = {"tile": tile + 1, "digit": digits[tile]}
        if self.random.random() < _WHICH_TILE_SHARE:
            wordings = [wording.format(**values) for wording in questions.WHICH_TILE]
            self._ask(batch, "which_tile", wordings, questions.WHICH_TILE_ANSWER.format(**values))
        else:
            wordings = [wording.format(**values) for wording in questions.TILE_SHOWS]
            self._ask(batch, "tile_shows", wordings, str(digits[tile]))

    def _shapes(self, batch: SceneBatch, index: int) -> None:
        """One to six shapes in cells of a 3 x 3 grid, so they never touch."""
        columns, rows = batch.grid
        size = np.array((columns, rows)) * self.tile_size / 3
        number = int(self.random.integers(1, MAX_SHAPES + 1))
        self._colours(batch, index)
        same_kind = int(self.random.integers(3)) if self.random.random() < 0.4 else None
        shapes = batch.shapes
        for k, cell in enumerate(self.random.permutation(9)[:number]):
            kind = int(self.random.integers(3)) if same_kind is None else same_kind
            radius = self.random.uniform(max(9.0, 0.1 * size.min()), 0.44 * size.min())
            shapes.kind[index, k] = kind
            shapes.radius[index, k] = radius
            corner = np.array((cell % 3, cell // 3)) * size
            shapes.centre[index, k] = corner + self.random.uniform(radius, size - radius)
            shapes.angle[index, k] = self.random.uniform(0, 2 * np.pi)
            shapes.colour[index, k] = self._colours(batch, index, draw_background=False)[1]
        kinds = shapes.kind[index]
        asked = int(self.random.integers(4))
        name = (*questions.SHAPES, questions.ANY_SHAPE)[asked]
        count = number if asked == len(questions.SHAPES) else int((kinds == asked).sum())
        wordings = [wording.format(shape=name) for wording in questions.COUNT]
        self._ask(batch, "count", wordings, str(count))

    def text_only(self) -> tuple[str, str, str]:
        """(task, question, answer) of a question without an image."""
        kind = self.random.integers(4)
        if kind < 2:
            text, _ = self._text(1)
            return "copy", str(self.random.choice(questions.COPY)).format(text=text), text
        a, b = sorted(self.random.integers(0, 10 if kind == 3 else 20, 2).tolist(), reverse=True)
        wordings = questions.DIFFERENCE if kind == 3 else questions.SUM
        answer = a - b if kind == 3 else a + b
        return "arithmetic", str(self.random.choice(wordings)).format(a=a, b=b), str(answer)

    def _ask(self, batch: SceneBatch, task: str, wordings: Sequence[str], answer: str) -> None:
        batch.task.append(task)
        batch.question.append(str(self.random.choice(wordings)))
        batch.answer.append(answer)

    def _text(self, min_length: int, max_length: int = MAX_CHARACTERS) -> tuple[str, int]:
        """A number, a word or random letters in one style of case, and a font that shows it."""
        max_length = min(max_length, self.max_length)
        font = int(self.random.choice(self.fonts))
        kind = self.random.random()
        length = int(self.random.integers(min_length, max_length + 1))
        if kind < 0.45:
            return "".join(map(str, self.random.integers(0, 10, length))), font
        letters = "".join(CHARACTERS[NUM_DIGITS + k] for k in self.random.integers(0, 26, length))
        if kind < 0.8:
            words = training_words()
            word = words[int(self.random.integers(len(words)))]
            letters = word[:length] if len(word) > max_length else word
        style = self.random.random()
        if style < 0.25 or not self.has_lower_case[font]:
            return letters.upper(), font
        return (letters.capitalize() if style < 0.5 else letters), font

    def _place(
        self,
        lines: Lines,
        row: int,
        text: str,
        font: int,
        ink: Ink,
        blur: float,
        corner: tuple[float, float],
        area: tuple[float, float],
        min_share: float = 0.0,
    ) -> None:
        """Puts `text` anywhere into the rectangle, as large as `min_share` of it at least."""
        characters = [CHARACTERS.index(character) for character in text]
        spacing = self.random.uniform(-0.01, 0.1) if self.random.random() < 0.5 else 0.0
        starts = np.cumsum([0.0, *(self.advances[font, c] + spacing for c in characters)])
        angle = self.random.normal(0, 0.03) if self.random.random() < 0.5 else 0.0
        stretch = np.exp(self.random.uniform(-0.22, 0.22))  # pixels of an em in x over those in y
        cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
        length = float(starts[-1]) * stretch  # in em of y
        largest = 0.96 * min(
            area[0] / (length * cos + 1.0 * sin), area[1] / (length * sin + 1.0 * cos)
        )
        smallest = min(max(MIN_EM, 9.0 * blur, 0.35 * min_share * largest), largest)
        em = float(np.exp(self.random.uniform(np.log(smallest), np.log(largest))))
        half = 0.5 * em * np.array((length * cos + sin, length * sin + cos))
        low, high = np.array(corner) + half, np.array(corner) + np.array(area) - half
        lines.centre[row] = self.random.uniform(low, np.maximum(low, high))
        lines.em[row] = em * stretch, em
        lines.angle[row] = angle
        lines.font[row] = font
        lines.colour_name[row], lines.colour[row] = ink
        lines.characters[row, : len(text)] = characters
        lines.starts[row, : len(starts)] = starts

    def _colours(self, batch: SceneBatch, index: int, *, draw_background: bool = True) -> Ink:
        """A named colour for the text and a background it stands out from."""
        names = list(questions.COLOURS)
        if self.random.random() < 0.3:
            names = ["black", "white"]
        background = batch.background[index]
        while True:
            name = names[int(self.random.integers(len(names)))]
            hue, saturation, value = (self.random.uniform(*r) for r in questions.COLOURS[name])
            colour = np.array(colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value), np.float32)
            if draw_background:
                base = self.random.uniform(0, 1, 3)
                grey = self.random.random() < 0.5
                base = np.full(3, base[0]) if grey else base
                background[0] = base
                background[1] = np.clip(base + self.random.normal(0, 0.08, 3), 0, 1)
            contrast = min(float(np.abs(_luma(colour) - _luma(end))) for end in background)
            distance = min(float(np.abs(colour - end).max()) for end in background)
            if contrast > 0.2 and distance > 0.3:
                return list(questions.COLOURS).index(name), colour
            if not draw_background:
                names = list(questions.COLOURS)


def _luma(colour: NDArray[np.float32]) -> float:
    """ITU-R BT.601."""
    return float(colour @ np.array((0.299, 0.587, 0.114)))
