"""Requests as JSON objects, one a line: `{"id", "prompt", "images", ...}`.

Unknown fields and wrong types are refused by name; paths are relative to the file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvlm.program.errors import UserError
from nvlm.program.jsonl import read_jsonl_lines
from runtime.requests.sampling import SamplingParams
from runtime.requests.types import GenerationRequest, ImageSource

_SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "seed")
_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    "system": (str,),
    "prompt_format": (str,),
    "max_new_tokens": (int,),
    "max_num_tiles": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
}
_FIELDS = {"id", "prompt", "images", "stop", *_OPTION_TYPES}


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
        line_id = values.get("id", number)
        request = request_from_json(values, path.parent, defaults)
    except (ValueError, RecursionError) as error:
        request = UserError(f"{path} line {number} is not JSON: {error}")
    except UserError as error:
        request = UserError(f"{path} line {number}: {error}")
    return RequestLine(line_id, request, number, path.parent)


def request_from_json(
    values: dict[str, Any], folder: Path, defaults: GenerationRequest
) -> GenerationRequest:
    """A request object; paths are relative to `folder`. Unknown fields are refused by name."""
    if unknown := sorted(values.keys() - _FIELDS):
        raise UserError(f"unknown field {unknown[0]!r}, expected {', '.join(sorted(_FIELDS))}")
    given = {name: value for name, value in values.items() if value is not None}
    for name, types in _OPTION_TYPES.items():
        value = given.get(name, types[0]())
        if isinstance(value, bool) or not isinstance(value, types):
            raise UserError(f"{name} is {value!r}, expected {types[-1].__name__}")
    if given.get("prompt_format", "hf") not in ("hf", "megatron"):
        raise UserError(f"prompt_format is {given['prompt_format']!r}, expected 'hf' or 'megatron'")
    sampling = {name: given[name] for name in _SAMPLING_FIELDS if name in given}
    options: dict[str, Any] = {
        name: given[name] for name in _OPTION_TYPES if name in given and name not in sampling
    }
    if "stop" in given:
        options["stop"] = tuple(_strings(given["stop"], "stop"))
    images = [folder / name for name in _strings(given.get("images", []), "images")]
    return replace(
        defaults,
        content=_content(given.get("prompt"), images, folder),
        sampling=with_sampling(defaults.sampling, sampling),
        **options,
    )


def with_sampling(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """A filter without a temperature means sampling at temperature 1."""
    if defaults.temperature == 0.0 and ("top_k" in given or "top_p" in given):
        given = {"temperature": 1.0, **given}
    return replace(defaults, **given)


def _strings(value: Any, name: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{name} is {value!r}, expected a list of strings")
    return value


def _content(prompt: Any, images: list[Path], folder: Path) -> tuple[str | ImageSource, ...]:
    """A string has its images first; a list of parts has them in line."""
    if isinstance(prompt, str):
        return GenerationRequest.images_first(prompt, tuple(images)).content
    if not isinstance(prompt, list):
        raise UserError(f"prompt is {prompt!r}, expected a string or a list of parts")
    if images:
        raise UserError("images stands beside a prompt of parts; put them into the parts")
    content: list[str | ImageSource] = []
    for part in prompt:
        match part:
            case {"type": "text", "text": str(text)}:
                content.append(text)
            case {"type": "image", "image": str(name)}:
                content.append(folder / name)
            case _:
                raise UserError(
                    f'prompt part {part!r} is neither {{"type": "text", "text": ...}} nor '
                    '{"type": "image", "image": path}'
                )
    return tuple(content)
