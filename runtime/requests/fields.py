"""The fields of a question: what is right for them, and what others call them.

A wrong value that is found later would end the questions that share the decoder's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, get_args

from nvlm.inputs.images import Page, PictureRules
from nvlm.inputs.prompt import PromptFormat
from nvlm.program.errors import UserError, shown
from nvlm.program.unicode import require_unicode
from runtime.requests.guide import Guide
from runtime.requests.sampling import SamplingParams

MOST_STOPS = 64
"""Stop strings that a server takes: each token is searched for all of them, and other requests
wait meanwhile."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "system": (lambda value: isinstance(value, str), "a str"),
    "prompt_format": (lambda value: value in get_args(PromptFormat), "'hf' or 'megatron'"),
    "max_num_tiles": (lambda value: value is None or _is_whole(value), "a whole number"),
    "pictures": (lambda value: isinstance(value, PictureRules), "PictureRules"),
    "stop": (lambda value: all(isinstance(each, str) for each in value), "a str or several"),
    "end_ids": (lambda value: all(map(_is_whole, value)), "token ids, whole numbers"),
    "sampling": (lambda value: isinstance(value, SamplingParams), "SamplingParams"),
    "guide": (lambda value: value is None or isinstance(value, Guide), "a Guide"),
    "priority": (_is_whole, "a whole number; the smallest is next"),
}
"""By field: what is right, and how a message says it."""


def check_fields(request: Any) -> None:
    """Raises `UserError` that names the first field of another type, or with half a character."""
    for name, (is_right, expected) in _EXPECTED.items():
        if not is_right(getattr(request, name)):
            raise UserError(f"{name} is {shown(getattr(request, name))}, expected {expected}")
    for text in request.stop:
        require_unicode(text, "stop")


def require_page(value: Any) -> Page:
    """Raises `UserError` for what names no page."""
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise UserError(f'page is {shown(value)}, expected a number from 1 or "all"')


OTHER_WORDS = {
    "image": "images",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "stop_words": "stop",
    "stop_strings": "stop",
    "system_prompt": "system",
    "random_seed": "seed",
    "num_return_sequences": "n",
    "min_new_tokens": "min_tokens",
    "bad_words_ids": "bad_words",
    "sequence_bias": "logit_bias",
    "return_log_probs": "logprobs",
    "json": "json_schema",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""What other software calls a field."""
