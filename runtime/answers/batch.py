"""Many requests through one engine: request file in, answer file out.

An answer line is written as soon as all lines before it are. A request that fails gets an "error"
line, and the others are answered. A rerun asks again what failed and resumes after the finished
lines, if they answer the same requests and the engine is the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nvlm.program.errors import UserError, shortened
from runtime.answers.answer_file import AnswerFile, answer_json, failed_ids
from runtime.answers.run_record import resume
from runtime.requests.request_file import RequestLine
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner

_MAX_NAMED = 20


def run_batch(runner: Runner, lines: list[RequestLine], output: Path) -> int:
    """Answers every line that `output` holds no answer to; returns the number of errors in it.

    Raises `UserError` where two lines have one id.
    """
    _require_own_ids(lines)
    pending: dict[int, dict[str, Any]] = {}
    with (
        AnswerFile(output, [line.id for line in lines]) as file,
        tqdm(total=len(lines), desc="answers") as progress,
    ):
        first, again = file.num_finished, list(file.failed)
        resume(output, runner.engine, lines, first, again)
        progress.update(first - len(again))
        asked = [*again, *range(first, len(lines))]
        for position, answer in _answers(runner, [lines[index] for index in asked]):
            index = asked[position]
            progress.update()
            if index < first:
                file.replace(index, answer)
            else:
                pending[index] = answer
            while file.num_finished in pending:
                file.append(pending.pop(file.num_finished))
        return len(file.failed)


def summary(num_requests: int, output: Path) -> str:
    """The last line of a batch: how many failed, which, and what to do."""
    requests = "1 request" if num_requests == 1 else f"{num_requests} requests"
    failed = failed_ids(output)
    if not failed:
        return f"{requests}, 0 failed"
    ids = ", ".join(shortened(json.dumps(each, ensure_ascii=False)) for each in failed[:_MAX_NAMED])
    more = f" and {len(failed) - _MAX_NAMED} more" if len(failed) > _MAX_NAMED else ""
    return (
        f"{requests}, {len(failed)} failed: {'id' if len(failed) == 1 else 'ids'} {ids}{more} in "
        f"{output}; run the same command to ask again"
    )


def _require_own_ids(lines: list[RequestLine]) -> None:
    """Refuses two lines of one id: their answers could not be distinguished."""
    seen: dict[str, int] = {}
    for line in lines:
        is_whole = isinstance(line.id, float) and line.id.is_integer()
        text = json.dumps(int(line.id) if is_whole else line.id, sort_keys=True)
        if text in seen:
            raise UserError(
                f"lines {seen[text]} and {line.number} of --input_file have the same id "
                f"{text}; give each its own (a line without one has its number)"
            )
        seen[text] = line.number


def _answers(runner: Runner, lines: list[RequestLine]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, answer) as they come; lines that hold no request first."""
    indices = []
    requests: list[GenerationRequest] = []
    for index, line in enumerate(lines):
        if isinstance(line.request, UserError):
            yield index, {"id": line.id, "error": str(line.request)}
        else:
            indices.append(index)
            requests.append(line.request)
    for position, result in runner.generate_batch(requests):
        index = indices[position]
        if isinstance(result, UserError):
            answer: dict[str, Any] = {"error": str(result)}
        else:
            answer = answer_json(result)
        yield index, {"id": lines[index].id, **answer}
