"""How VQA's evaluation makes answers comparable before it compares them, quirks included.

By the rules of vqaEval.py (GT-Vision-Lab/VQA), which Open Flamingo and through it Megatron-LM use;
tests/data/evaluation_goldens.json holds what that program gives. No package that can be installed
without a model zoo carries it.
"""

from __future__ import annotations

import re
from functools import lru_cache

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the reference hands a flag to re.sub where the count belongs: re.UNICODE
_ARTICLES = ("a", "an", "the")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}

# The reference's table by what it maps to. A form is found without its apostrophe; one with two or
# three apostrophes when any one of them is missing.
_CONTRACTIONS = """\
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _missing_one_apostrophe(form: str) -> list[str]:
    places = [place for place, character in enumerate(form) if character == "'"]
    return [form[:place] + form[place + 1 :] for place in places]


_CONTRACTED = {
    spelling: form for form in _CONTRACTIONS.split() for spelling in _missing_one_apostrophe(form)
} | {"somebody'd": "somebodyd"}


@lru_cache(maxsize=1 << 16)  # ten people a question say much the same
def normalize(text: str) -> str:
    """Lower case, no punctuation, digits for number words up to ten, no articles."""
    return _digits_and_articles(_strip_punctuation(text))


def _strip_punctuation(text: str) -> str:
    """A mark becomes a space inside a word and nothing at its edge; a comma between digits
    anywhere makes every mark go."""
    has_comma = _NUMBER_WITH_COMMA.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        is_at_edge = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_at_edge or has_comma else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def _digits_and_articles(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)
