"""Requests as JSON objects, one a line: `{"id", "prompt", "images", ...}`.

Unknown fields and wrong types are refused by name; paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvlm.inputs.images import Page
from nvlm.program.errors import UserError, shortened, shown
from nvlm.program.jsonl import read_jsonl_lines
from runtime.requests.picture_source import picture_source
from runtime.requests.sampling import SETTINGS, given_settings, with_sampling
from runtime.requests.types import GenerationRequest, ImageSource

_SHOWN_CHARACTERS = 200
_OPTION_TYPES = {"system": str, "prompt_format": str, "max_new_tokens": int, "max_num_tiles": int}
_TYPES = {**_OPTION_TYPES, **{setting.name: setting.type for setting in SETTINGS}}
_FIELDS = {"id", "prompt", "images", "page", "stop", *_TYPES}


@dataclass(frozen=True, slots=True)
class RequestLine:
    """A line of the input file: its id, the request or what is wrong with it, its number from 1.
    The images' paths lie in `folder` unless they are absolute."""

    id: Any
    request: GenerationRequest | UserError
    number: int
    folder: Path


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
        values = json.loads(line)
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


def request_from_json(
    values: dict[str, Any], folder: Path, defaults: GenerationRequest
) -> GenerationRequest:
    """A request object; paths are relative to `folder`. Unknown fields are refused by name."""
    if unknown := sorted(values.keys() - _FIELDS):
        raise UserError(f"unknown field {shown(unknown[0])}, expected {', '.join(sorted(_FIELDS))}")
    given = {name: value for name, value in values.items() if value is not None}
    for name, expected in _TYPES.items():
        if name in given:
            _check_type(name, given[name], expected)
    if given.get("prompt_format", "hf") not in ("hf", "megatron"):
        found = shown(given["prompt_format"])
        raise UserError(f"prompt_format is {found}, expected 'hf' or 'megatron'")
    options: dict[str, Any] = {name: given[name] for name in _OPTION_TYPES if name in given}
    if "stop" in given:
        options["stop"] = tuple(_strings(given["stop"], "stop"))
    if "page" in given:
        options["pictures"] = replace(defaults.pictures, page=_page(given["page"]))
    names = _strings(given.get("images", []), "images")
    images = [picture_source(name, folder) for name in names]
    return replace(
        defaults,
        content=_content(given.get("prompt"), images, folder),
        sampling=with_sampling(defaults.sampling, given_settings(given)),
        **options,
    )


def _check_type(name: str, value: Any, expected: type) -> None:
    """JSON has one kind of number: a whole one is a float too. true and false are none."""
    accepted = (int, float) if expected is float else expected
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise UserError(f"{name} is {shown(value)}, expected {expected.__name__}")


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{name} is {shown(value)}, expected a list of strings")
    return value


def _page(value: Any) -> Page:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise UserError(f'page is {shown(value)}, expected a number from 1 or "all"')


def _content(
    prompt: Any, images: Sequence[ImageSource], folder: Path
) -> tuple[str | ImageSource, ...]:
    """A string has its images first; a list of parts has them in line."""
    if isinstance(prompt, str):
        return GenerationRequest.images_first(prompt, tuple(images)).content
    if not isinstance(prompt, list):
        raise UserError(f"prompt is {shown(prompt)}, expected a string or a list of parts")
    if images:
        raise UserError("images stands beside a prompt of parts; put them into the parts")
    content: list[str | ImageSource] = []
    for part in prompt:
        match part:
            case {"type": "text", "text": str(text)}:
                content.append(text)
            case {"type": "image", "image": str(name)}:
                content.append(picture_source(name, folder))
            case {"type": "image_url", "image_url": {"url": str(name)}}:
                content.append(picture_source(name, folder))
            case _:
                raise UserError(
                    f"prompt part {shortened(repr(part))[:_SHOWN_CHARACTERS]} is neither "
                    '{"type": "text", "text": ...} nor {"type": "image", "image": path or data: '
                    'URL}, or "image_url" as chat messages have it'
                )
    return tuple(content)
