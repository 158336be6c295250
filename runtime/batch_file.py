"""JSONL in, JSONL out: many requests through one engine, resumable after a stop.

An answer line is written as soon as all lines before it are; a rerun with the same output file
goes on behind the finished ones. A request that fails gets an "error" line, the others go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nvlm.errors import UserError
from runtime.runner import Runner
from runtime.sampling import SamplingParams
from runtime.types import GenerationRequest, GenerationResult, ImageSource

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
class BatchLine:
    """A line of the input file: its id and the request, or what is wrong with it."""

    id: Any
    request: GenerationRequest | UserError


def read_requests(path: Path, defaults: GenerationRequest) -> list[BatchLine]:
    """All lines; `defaults` gives the options a line leaves out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--input_file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--input_file {path} is not UTF-8: {error}") from None
    return [
        _read_line(path, number, line, defaults)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _read_line(path: Path, number: int, line: str, defaults: GenerationRequest) -> BatchLine:
    line_id: Any = number
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise UserError(f"expected a JSON object, found {type(values).__name__}")
        line_id = values.get("id", number)
        return BatchLine(line_id, request_from_json(values, path.parent, defaults))
    except ValueError as error:
        return BatchLine(line_id, UserError(f"{path} line {number} is not JSON: {error}"))
    except UserError as error:
        return BatchLine(line_id, UserError(f"{path} line {number}: {error}"))


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


def answer_json(result: GenerationResult) -> dict[str, Any]:
    """A result as a JSON object, text first."""
    values = asdict(result)
    timings = {name: round(value, 3) for name, value in values.pop("timings").items()}
    return {**values, "timings": timings}


def run_batch(runner: Runner, lines: list[BatchLine], output: Path) -> int:
    """Answers every line that `output` does not hold yet; returns the number of errors in it."""
    num_errors, num_finished = _finished(lines, output)
    num_done = num_finished
    with open(output, "a", encoding="utf-8") as file:
        pending: dict[int, dict[str, Any]] = {}
        progress = tqdm(total=len(lines), initial=num_done, desc="answers", unit="request")
        for index, answer in _answers(runner, lines[num_finished:]):
            pending[num_finished + index] = answer
            num_errors += "error" in answer
            progress.update()
            while num_done in pending:
                file.write(json.dumps(pending.pop(num_done), ensure_ascii=False) + "\n")
                file.flush()
                num_done += 1
        progress.close()
    return num_errors


def _answers(runner: Runner, lines: list[BatchLine]) -> Iterator[tuple[int, dict[str, Any]]]:
    good = [(i, line) for i, line in enumerate(lines) if not isinstance(line.request, UserError)]
    for i, line in enumerate(lines):
        if isinstance(line.request, UserError):
            yield i, {"id": line.id, "error": str(line.request)}
    requests = (line.request for _, line in good if isinstance(line.request, GenerationRequest))
    for position, result in runner.generate_batch(requests):
        i, line = good[position]
        if isinstance(result, UserError):
            yield i, {"id": line.id, "error": str(result)}
        else:
            yield i, {"id": line.id, **answer_json(result)}


def _finished(lines: list[BatchLine], output: Path) -> tuple[int, int]:
    """(errors, lines) that `output` already holds; a half-written last line is cut off."""
    if not output.exists():
        return 0, 0
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    answers = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            answers.append(json.loads(text))
            matches = number <= len(lines) and answers[-1]["id"] == lines[number - 1].id
        except (ValueError, TypeError, KeyError):
            matches = False
        if not matches:
            raise UserError(
                f"--output_file {output} line {number} does not belong to this input file; choose "
                "another output file"
            )
    if len(whole) < len(data):
        with open(output, "rb+") as file:
            file.truncate(len(whole))
    return sum("error" in answer for answer in answers), len(answers)
