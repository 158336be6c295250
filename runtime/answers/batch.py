"""Many requests through one engine: request file in, answer file out.

An answer line is written as soon as all lines before it are; a rerun goes on behind the finished
ones, if they answer the same requests and the engine is the same. A request that fails gets an
"error" line and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nvlm.program.errors import UserError
from runtime.answers.answer_file import AnswerFile, answer_json
from runtime.answers.run_record import resume
from runtime.requests.request_file import RequestLine
from runtime.requests.types import GenerationRequest
from runtime.serving.runner import Runner


def run_batch(runner: Runner, lines: list[RequestLine], output: Path) -> int:
    """Answers every line that `output` does not hold yet; returns the number of errors in it."""
    pending: dict[int, dict[str, Any]] = {}
    with (
        AnswerFile(output, [line.id for line in lines]) as file,
        tqdm(total=len(lines), initial=file.num_finished, desc="answers") as progress,
    ):
        first = file.num_finished
        resume(output, runner.engine, lines, first)
        for index, answer in _answers(runner, lines[first:]):
            pending[first + index] = answer
            progress.update()
            while file.num_finished in pending:
                file.append(pending.pop(file.num_finished))
        return file.num_errors


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
        answer = {"error": str(result)} if isinstance(result, UserError) else answer_json(result)
        yield index, {"id": lines[index].id, **answer}
