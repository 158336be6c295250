"""What may be wrong with bytes and with JSON: a few changes to something that is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")
Draw = Callable[[st.SearchStrategy[Any]], Any]

EXTREMES = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 20, (1 << 31) - 1, 1 << 31)
_HEAD = 256
"""Where files say what they are: half of all changes happen there."""

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 7, -1, 1.5, -0.0, 1e30, 1e-30, float("nan"), float("inf")),
    *(10**30, -(10**30), 1 << 31, 1 << 63, 1 << 70, "", "x", "1", "NaN", "\ud800", "\0", "a\nb"),
    *(
        "/",
        "..",
        "a" * 5000,
        "\u2028",
        [],
        {},
        [[]],
        [None],
        {"": None},
        ["a", 1],
        {"a": {"b": []}},
    ),
)


@st.composite
def mutated_bytes(draw: Draw, seeds: Sequence[bytes], most: int = 6) -> bytes:
    """One of `seeds` with up to `most` changes; fields of 1, 2, 4 and 8 bytes among them."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, most))):
        change_bytes(draw, data, seeds)
    return bytes(data)


def change_bytes(draw: Draw, data: bytearray, seeds: Sequence[bytes]) -> None:
    last = max(0, len(data) - 1)
    place = draw(st.one_of(st.integers(0, min(_HEAD, last)), st.integers(0, last)))
    length = draw(st.one_of(st.integers(1, 8), st.integers(1, 400)))
    match draw(st.sampled_from(("flip", "field", "field", "cut", "put", "twice", "end", "splice"))):
        case "flip" if data:
            data[place] ^= draw(st.integers(1, 255))
        case "field":
            width = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.one_of(st.sampled_from(EXTREMES), st.integers(0, (1 << 64) - 1)))
            order: Any = draw(st.sampled_from(("little", "big")))
            data[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, order)
        case "cut":
            del data[place : place + length]
        case "put":
            data[place:place] = draw(st.binary(max_size=16)) * draw(st.sampled_from((1, 1, 30)))
        case "twice":
            data[place:place] = data[place : place + length]
        case "end":
            del data[place:]
        case "splice":
            data[place:] = draw(st.sampled_from(seeds))[place:]


@st.composite
def mutated_json(draw: Draw, seeds: Sequence[Any], most: int = 3) -> Any:
    """One of `seeds` with up to `most` values changed, left out, doubled, renamed or moved."""
    value = deepcopy(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, most))):
        value = _change(draw, value)
    return value


@st.composite
def json_text(draw: Draw, seeds: Sequence[Any]) -> bytes:
    """As `mutated_json`; of one in ten the text is damaged too."""
    text = json.dumps(draw(mutated_json(seeds))).encode()
    if draw(st.integers(0, 9)):
        return text
    data = bytearray(text)
    change_bytes(draw, data, [text])
    return bytes(data)


def _change(draw: Draw, root: Any) -> Any:
    holder: Any = [root]
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 5)):
        holder = holder[key]
        key = draw(
            st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder)))
        )
    top = [root] if holder[key] is root else None
    if top is not None:
        holder, key = top, 0
    old = holder[key]
    match draw(st.sampled_from(("odd", "odd", "odd", "drop", "twice", "rename", "number", "move"))):
        case "drop" if top is None:
            del holder[key]
        case "twice" if isinstance(holder, list) and top is None:
            holder.insert(key, deepcopy(old))
        case "rename" if isinstance(holder, dict):
            holder[draw(st.sampled_from(("", "x", f"{key}2", f"{key}".upper())))] = holder.pop(key)
        case "number" if isinstance(old, int | float) and not isinstance(old, bool):
            holder[key] = draw(
                st.sampled_from((old + 1, old - 1, -old, old * 2, old / 3, old * 100))
            )
        case "move" if isinstance(root, dict) and root:
            holder[key] = deepcopy(root[draw(st.sampled_from(list(root)))])
        case _:
            holder[key] = deepcopy(draw(st.sampled_from(ODD_VALUES)))
    return root if top is None else top[0]
