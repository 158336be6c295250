"""What the small model is asked and how it answers: wordings, one row per task.

Training and evaluation use the same wordings; the pictures are what is held out.
"""

from __future__ import annotations

NUMBER = (
    "Read the number.",
    "What number is shown?",
    "Which number is in the image?",
    "What is the number?",
    "Please read the number in the image.",
)
WORD = (
    "Read the word.",
    "What word is shown?",
    "Which word is in the image?",
    "What does it say?",
    "Please read the word in the image.",
)
TWO_LINES = (
    "Read both lines.",
    "Read the two lines in order.",
    "What do the two lines say?",
    "Read the text line by line.",
)
COLOUR = (
    "What colour is the text?",
    "Name the colour of the text.",
    "Which colour does the text have?",
    "What is the colour of the text?",
)
WHICH_TILE = (
    "Which tile shows the digit {digit}?",
    "In which tile is the digit {digit}?",
    "Where is the digit {digit}?",
)
WHICH_TILE_ANSWER = "tile {tile}"
TILE_SHOWS = (
    "What does tile {tile} show?",
    "Which digit is in tile {tile}?",
    "Read the digit in tile {tile}.",
)
COUNT = (
    "How many {shape} are there?",
    "Count the {shape}.",
    "What is the number of {shape}?",
)
COPY = (
    'Repeat "{text}".',
    'Copy "{text}".',
    'Say "{text}".',
)
SUM = (
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "{a} plus {b}?",
)
DIFFERENCE = (
    "What is {a} minus {b}?",
    "Take {b} from {a}.",
    "{a} minus {b}?",
)

SHAPES = ("circles", "squares", "triangles")
ANY_SHAPE = "shapes"

# Name -> (hue in degrees, saturation, value), each a range. The ranges do not touch.
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "black": ((0, 360), (0.0, 0.3), (0.0, 0.12)),
    "white": ((0, 360), (0.0, 0.04), (0.95, 1.0)),
    "red": ((-6, 6), (0.8, 1.0), (0.65, 1.0)),
    "orange": ((26, 36), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((52, 60), (0.75, 1.0), (0.9, 1.0)),
    "green": ((105, 145), (0.6, 1.0), (0.35, 0.8)),
    "blue": ((212, 236), (0.7, 1.0), (0.5, 1.0)),
    "purple": ((270, 290), (0.55, 0.95), (0.4, 0.75)),
    "pink": ((322, 338), (0.3, 0.55), (0.92, 1.0)),
}

WORDINGS = (
    *(NUMBER, WORD, TWO_LINES, COLOUR, WHICH_TILE, TILE_SHOWS, COUNT, COPY, SUM, DIFFERENCE),
    (WHICH_TILE_ANSWER,),
)
"""Every wording, for the tokenizer's merges."""
