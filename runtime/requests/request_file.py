"""Requests as JSON objects, one a line: `{"id", "prompt" or "messages", "images", ...}`.

Unknown fields and wrong types are refused by name; paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nvlm.inputs.picture_source import picture_source
from nvlm.program.errors import UserError, shown
from nvlm.program.file_kinds import is_device
from nvlm.program.jsonl import read_jsonl_lines
from nvlm.program.nearest import nearest
from runtime.requests.fields import OTHER_WORDS, require_page
from runtime.requests.guide import GUIDE_KINDS, given_guide
from runtime.requests.messages import (
    Conversation,
    ImageSource,
    conversation,
    parts,
    question,
)
from runtime.requests.sampling import (
    SETTINGS,
    given_settings,
    require_consistent,
    with_sampling,
)
from runtime.requests.setting import Number
from runtime.requests.types import GenerationRequest

_OPTION_TYPES = {"system": str, "prompt_format": str, "max_new_tokens": int, "max_num_tiles": int}
_TYPES = {
    **_OPTION_TYPES,
    **{setting.name: setting.type for setting in SETTINGS if isinstance(setting, Number)},
}
_FIELDS = {"id", "prompt", "messages", "images", "page", "stop", *_OPTION_TYPES, *GUIDE_KINDS} | {
    setting.name for setting in SETTINGS
}
_OTHER_WORDS = OTHER_WORDS | {
    "custom_id": "id",
    "question": "prompt",
    "query": "prompt",
    "text": "prompt",
}


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line of the input file."""

    id: Any  # the line's `id`, any JSON value; without one its number
    request: GenerationRequest | UserError  # the error says what is wrong with the line
    number: int  # of the line, from 1
    folder: Path  # where the images' paths lie unless they are absolute


def read_requests(path: Path, defaults: GenerationRequest) -> list[RequestLine]:
    """All lines; `defaults` gives the options a line leaves out."""
    return [
        _read_line(path, number, line, defaults)
        for number, line in read_jsonl_lines(path, "--input_file")
    ]


def _read_line(path: Path, number: int, line: str, defaults: GenerationRequest) -> RequestLine:
    line_id: Any = number
    request: GenerationRequest | UserError
    try:
        values = json.loads(line, object_pairs_hook=_with_each_key_once)
        if not isinstance(values, dict):
            raise UserError(f"expected a JSON object, found {type(values).__name__}")
        line_id = _line_id(values.get("id", number))
        request = request_from_json(values, path.parent, defaults)
    except (ValueError, RecursionError) as error:
        request = UserError(f"{path} line {number} is not JSON: {error}")
    except UserError as error:
        request = UserError(f"{path} line {number}: {error}")
    return RequestLine(line_id, request, number, path.parent)


def _line_id(value: Any) -> Any:
    """Any JSON value. NaN equals not even itself, so a rerun would not know its own answers."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise UserError(
            f"id is {shown(value)}, expected a JSON value, as text or a number"
        ) from None
    return value


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a key that comes twice: Python would keep its last value alone."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{shown(twice)} is given twice, expected each field once; leave one out")
    return values


def request_from_json(
    values: dict[str, Any], folder: Path, defaults: GenerationRequest
) -> GenerationRequest:
    """A request object; paths are relative to `folder`. Unknown fields are refused by name."""
    if unknown := sorted(values.keys() - _FIELDS):
        raise UserError(
            f"unknown field {shown(unknown[0])}, expected {', '.join(sorted(_FIELDS))}"
            f"{nearest(unknown[0], _FIELDS, _OTHER_WORDS)}"
        )
    given = {name: value for name, value in values.items() if value is not None}
    for name, expected in _TYPES.items():
        if name in given:
            _check_type(name, given[name], expected)
    if given.get("prompt_format", "hf") not in ("hf", "megatron"):
        raise UserError(
            f"prompt_format is {shown(given['prompt_format'])}, expected 'hf' or 'megatron'"
        )
    options: dict[str, Any] = {name: given[name] for name in _OPTION_TYPES if name in given}
    if "stop" in given:
        options["stop"] = tuple(_strings(given["stop"], "stop"))
    if guide := given_guide(given):
        options["guide"] = guide
    if "page" in given:
        options["pictures"] = replace(defaults.pictures, page=require_page(given["page"]))
    request = replace(
        defaults,
        sampling=with_sampling(defaults.sampling, given_settings(given)),
        **{**options, **_asked(given, folder)},
    )
    require_consistent(request.sampling, request.max_new_tokens)
    return request


def read_messages(path: Path, images: Iterable[ImageSource], *, has_system: bool) -> Conversation:
    """A file of messages, a JSON list; paths are relative to it. `images` as `conversation` has
    them."""
    if is_device(path):
        raise UserError(f"--messages {path} is a device, whose end may never come; give a file")
    try:
        messages = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"--messages {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--messages {path} is not JSON: {error}") from None
    source = partial(picture_source, folder=path.parent)
    try:
        return conversation(messages, images, source, has_system=has_system)
    except UserError as error:
        raise UserError(f"--messages {path}: {error}") from None


def _check_type(name: str, value: Any, expected: type) -> None:
    """JSON has one kind of number: a whole one is a float too. true and false are none."""
    accepted = (int, float) if expected is float else expected
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise UserError(f"{name} is {shown(value)}, expected {expected.__name__}")


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{name} is {shown(value)}, expected a list of strings")
    return value


def _asked(given: dict[str, Any], folder: Path) -> Conversation:
    """What the line asks: by `messages`, or by `prompt`. A prompt that is a string has its images
    first or by its marks, a list of parts has them in line."""
    source = partial(picture_source, folder=folder)
    images: list[ImageSource] = [
        source(name) for name in _strings(given.get("images", []), "images")
    ]
    prompt = given.get("prompt")
    if "messages" in given:
        if prompt is not None:
            raise UserError("prompt stands beside messages; make it the last message")
        return conversation(given["messages"], images, source, has_system="system" in given)
    if isinstance(prompt, str):
        return {"content": question(prompt, images)}
    if prompt == []:
        raise UserError("prompt is [], expected one or more parts")
    if isinstance(prompt, list) and images:
        raise UserError("images stands beside a prompt of parts; put them into the parts")
    return {"content": parts(prompt, "prompt", source)}
