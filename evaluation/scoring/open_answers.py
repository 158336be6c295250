"""MMMU's open questions: what a free answer may mean, and whether the truth is among it.

By the rules of parse_open_response and eval_open in the MMMU repository (mmmu/utils/eval_utils.py).
"""

from __future__ import annotations

import re

Value = str | float

_INDICATORS = (*("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "),)
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
# With thousands' commas; in scientific notation; plain, and neither of the former.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def is_right(prediction: str, truth: str | list[str]) -> bool:
    """A truth that is a number must equal one of the prediction's, to two decimals; a word must
    stand in it."""
    truths = [truth] if isinstance(truth, str) else truth
    expected = [value for text in truths for value in _normalize(text)]
    for candidate in _candidates(prediction):
        if isinstance(candidate, float):
            if candidate in expected:
                return True
        elif any(isinstance(value, str) and value in candidate for value in expected):
            return True
    return False


def _candidates(response: str) -> list[Value]:
    """The ends of the lines after words that announce an answer, and the numbers in them."""
    phrases = _key_phrases(response.strip().strip(".").lower())
    numbers = [match for phrase in phrases for p in _NUMBERS for match in p.findall(phrase)]
    return [value for text in (*phrases, *numbers) for value in _normalize(text)]


def _key_phrases(response: str) -> list[str]:
    # The reference splits at ". " before a capital too, of which its lower case leaves none.
    lines = response.split("\n")
    phrases = []
    for number, line in enumerate(lines, 1):
        indicators = (*_INDICATORS, "=") if number == len(lines) else _INDICATORS
        ends = [line.split(word)[-1].strip() for word in indicators if word in line]
        shortest = _shortest(ends)
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [response]


def _shortest(ends: list[str]) -> str:
    """The first of the shortest; an empty one gives way to what comes after it."""
    best = ""
    for end in ends:
        if not best or len(end) < len(best):
            best = end
    return best


def _normalize(text: str) -> list[Value]:
    """A number to two decimals, else lower case; a lone letter must have a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
