"""Which option a free answer means (MMMU's parse_multi_choice_response, as Megatron-LM has it)."""

from __future__ import annotations

import re

_EDGES = (",", ".", "!", "?", ";", ":", "'")
_MARKED = tuple(re.compile(rf"\\{name}\{{(.*?)\}}") for name in ("answer", "boxed"))


def chosen_letter(response: str, letters: list[str], options: dict[str, str]) -> str:
    """A bracketed letter, else a letter on its own, else (in more than five words) an option's
    text; the last one named counts. The first option where there is none of them: the MMMU
    repository draws one at random, which no comparison of engines can use.
    """
    for edge in _EDGES:
        response = response.strip(edge)
    text = f" {response} "
    lowered = text.lower()
    if found := [c for c in letters if f"({c})" in text or f"{c})" in text]:
        places = [text.rfind(f"({c})") for c in found]
    elif found := [c for c in letters if f" {c} " in text]:
        places = [text.rfind(f" {c} ") for c in found]
    else:
        is_long = len(response.split()) > 5
        found = [c for c, option in options.items() if is_long and option.lower() in lowered]
        places = [lowered.rfind(options[c].lower()) for c in found]
    if not found:
        return letters[0]
    return found[places.index(max(places))]


def marked_answer(text: str) -> str:
    r"""What stands in \answer{} or \boxed{}, else the text."""
    for pattern in _MARKED:
        if match := pattern.search(text):
            return match[1]
    return text.replace("Answer:", "Answer: ")
