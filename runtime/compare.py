"""The same requests through two engine directories: where the second parts from the first, how far
apart they are, how fast each is.

Meant for a new engine against the torch executor on the same checkpoint. They run one after the
other, so that each has the GPU to itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from runtime.decoder.executor import DecoderExecutor, DecoderRequest, StepOutput
from runtime.engine_dir import EngineDir
from runtime.runner import Runner
from runtime.types import GenerationRequest, GenerationResult


@dataclass(frozen=True, slots=True)
class Recording:
    """One request: prompt_table and logits [num_tokens, vocab_size] float32 on the CPU."""

    token_ids: list[int]
    prompt_table: torch.Tensor | None
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """All requests through one engine, decoded together."""

    recordings: list[Recording]
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(recording.token_ids) for recording in self.recordings) / self.seconds


@dataclass(frozen=True, slots=True)
class Difference:
    """first_differing_token is None when one answer is the other, or its beginning and both ended.

    Errors are relative (2-norm). Logits are compared up to and including the first differing
    token, where both have seen the same tokens; `margin` is by how much the reference preferred its
    token there, in units of the largest difference of any logit: below 2 the two may well differ.
    """

    num_tokens: int
    first_differing_token: int | None
    vision_error: float | None
    logit_error: float | None
    margin: float | None

    def line(self) -> str:
        if self.first_differing_token is None:
            told = "1 token" if self.num_tokens == 1 else f"all {self.num_tokens} tokens"
            told += " equal"
        else:
            told = f"token {self.first_differing_token} of {self.num_tokens} differs"
            if self.margin is not None:
                told += f" (preferred by {self.margin:.1f} x the largest logit difference)"
        for name, error in (("vision", self.vision_error), ("logits", self.logit_error)):
            if error is not None:
                told += f", {name} {error:.1e}"
        return told


class _Recorder:
    """A `DecoderExecutor` that asks for logits and keeps what goes in and comes out."""

    def __init__(self, decoder: DecoderExecutor) -> None:
        self.decoder = decoder
        self.limits = decoder.limits
        self.requests: dict[int, DecoderRequest] = {}
        self.logits: dict[int, list[torch.Tensor]] = {}

    def submit(self, request: DecoderRequest) -> int:
        request_id = self.decoder.submit(replace(request, return_logits=True))
        self.requests[request_id], self.logits[request_id] = request, []
        return request_id

    def step(self) -> list[StepOutput]:
        outputs = self.decoder.step()
        for output in outputs:
            if output.logits is not None:
                self.logits[output.request_id].append(output.logits.to("cpu", torch.float32))
        return outputs

    def cancel(self, request_id: int) -> None:
        self.decoder.cancel(request_id)

    def prepare_thread(self) -> None:
        self.decoder.prepare_thread()

    def run_worker(self) -> None:
        self.decoder.run_worker()

    def close(self) -> None:
        self.decoder.close()


def record(runner: Runner, requests: list[GenerationRequest]) -> Run:
    """Answers every request once to warm up and once for the record; raises what fails."""
    recorder = _Recorder(runner.decoder)
    recording = Runner(EngineDir.read(runner.engine.directory), runner.vision, recorder)
    _answer(recording, requests[:1])
    warm_up = len(recorder.requests)
    started = time.perf_counter()
    results = _answer(recording, requests)
    seconds = time.perf_counter() - started
    # Requests are submitted in order, so ids are in that order too.
    ids = list(recorder.requests)[warm_up:]
    return Run(
        [
            Recording(
                result.token_ids,
                _on_cpu(recorder.requests[request_id].prompt_table),
                torch.stack(recorder.logits[request_id])
                if recorder.logits[request_id]
                else torch.empty(0, 0),
            )
            for result, request_id in zip(results, ids, strict=True)
        ],
        seconds,
    )


def _answer(runner: Runner, requests: list[GenerationRequest]) -> list[GenerationResult]:
    found: dict[int, GenerationResult] = {}
    for index, result in runner.generate_batch(requests):
        if not isinstance(result, GenerationResult):
            raise result
        found[index] = result
    return [found[index] for index in range(len(requests))]


def _on_cpu(table: torch.Tensor | None) -> torch.Tensor | None:
    return None if table is None else table.to("cpu", torch.float32)


def differences(engine: Run, reference: Run) -> Iterator[Difference]:
    for found, expected in zip(engine.recordings, reference.recordings, strict=True):
        yield _difference(found, expected)


def _difference(found: Recording, expected: Recording) -> Difference:
    pairs = zip(found.token_ids, expected.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    shorter = min(len(found.token_ids), len(expected.token_ids))
    if first is None and len(found.token_ids) != len(expected.token_ids):
        first = shorter  # one of them ended
    num_rows = min(len(found.logits), len(expected.logits))
    num_rows = num_rows if first is None else min(num_rows, first + 1)
    logit_error, margin = None, None
    if num_rows:
        a, b = found.logits[:num_rows], expected.logits[:num_rows]
        logit_error = _relative_error(a, b)
        if first is not None and first < num_rows:
            top = b[first].topk(2).values
            margin = float((top[0] - top[1]) / (a[first] - b[first]).abs().max().clamp_min(1e-30))
    vision_error = None
    if found.prompt_table is not None and expected.prompt_table is not None:
        vision_error = _relative_error(found.prompt_table, expected.prompt_table)
    return Difference(len(expected.token_ids), first, vision_error, logit_error, margin)


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def report_json(engine: Run, reference: Run) -> dict[str, Any]:
    found = list(differences(engine, reference))
    return {
        "requests": [asdict(difference) for difference in found],
        "num_equal": sum(difference.first_differing_token is None for difference in found),
        "tokens_per_s": engine.tokens_per_s,
        "reference_tokens_per_s": reference.tokens_per_s,
    }
