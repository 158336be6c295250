"""The same requests through two engine directories: where the second parts from the first, how far
apart they are, how fast each is.

Meant for a new engine against the torch executor on the same checkpoint. They run one after the
other, so that each has the GPU to itself. Of their answers memory holds the token ids: logits and
prompt tables go to files as they come (float32; 0.6 MB a token at the 72B model's vocabulary, for
each engine) and are mapped again where they are compared, some rows at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nvlm.formats import layout
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderExecutor, DecoderRequest, StepOutput
from runtime.decoder.guidance import Guidance
from runtime.engine.engine_dir import EngineDir
from runtime.requests.types import GenerationRequest, GenerationResult
from runtime.serving.prepare import compile_guide, prepare
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket

_COMPARED_ROWS = 16
"""So many are in memory as float64: 20 MB of the 72B model's logits."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One request. Tensors are mapped from files."""

    token_ids: list[int]  # of the answer
    prompt_table: torch.Tensor | None  # [num_virtual_tokens, hidden_size] float32; None: no image
    logits: torch.Tensor  # [num_tokens, vocab_size] float32


@dataclass(frozen=True, slots=True)
class Run:
    """All requests through one engine, decoded together."""

    recordings: list[Recording]  # in the order of the requests
    seconds: float  # from the first step to the last

    @property
    def tokens_per_s(self) -> float:
        return sum(len(recording.token_ids) for recording in self.recordings) / self.seconds


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two answers to one request are apart.

    Errors are relative (2-norm). Logits are compared up to and including the first differing
    token, where both have seen the same tokens.
    """

    num_tokens: int  # of the reference's answer
    # From 0; None: one answer is the other, or its beginning and both ended.
    first_differing_token: int | None
    vision_error: float | None  # of the prompt table; None: no image
    logit_error: float | None  # None: nothing can be compared
    # By how much the reference preferred its token there, in units of the largest difference of any
    # logit. Below 2 the two may well differ.
    margin: float | None

    def line(self) -> str:
        if self.first_differing_token is None:
            text = "1 token" if self.num_tokens == 1 else f"all {self.num_tokens} tokens"
            text += " equal"
        else:
            text = f"token {self.first_differing_token} of {self.num_tokens} differs"
            if self.margin is not None:
                text += f" (preferred by {self.margin:.1f} x the largest logit difference)"
        for name, error in (("vision", self.vision_error), ("logits", self.logit_error)):
            if error is not None:
                text += f", {name} {error:.1e}"
        return text


class _RowsFile:
    """float32 rows of one width, appended to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_rows = self._num_columns = 0

    def append(self, rows: torch.Tensor) -> None:
        """rows: [n, num_columns]."""
        try:
            with open(self._path, "ab", buffering=0) as file:
                rest = memoryview(rows.to("cpu", torch.float32).numpy().tobytes())
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            raise UserError(
                f"--compare keeps logits in {self._path.parent}, which cannot be written: "
                f"{error.strerror}; set TMPDIR to a folder with more space, or ask fewer requests"
            ) from None
        self._num_rows += len(rows)
        self._num_columns = rows.shape[1]

    def mapped(self) -> torch.Tensor:
        size = self._num_rows * self._num_columns
        flat = torch.from_file(str(self._path), size=size) if size else torch.empty(0)
        return flat.view(self._num_rows, self._num_columns)


class _Recorder:
    """A `DecoderExecutor` that asks for logits and keeps in files what goes in and comes out."""

    def __init__(self, decoder: DecoderExecutor, folder: Path) -> None:
        self.decoder = decoder
        self.limits = decoder.limits
        self.folder = folder
        self.tables: dict[int, _RowsFile | None] = {}
        self.logits: dict[int, _RowsFile] = {}

    def submit(self, request: DecoderRequest) -> int:
        request_id = self.decoder.submit(replace(request, return_logits=True))
        self.logits[request_id] = _RowsFile(self.folder / f"{request_id}.logits")
        table = None
        if request.prompt_table is not None:
            table = _RowsFile(self.folder / f"{request_id}.table")
            table.append(request.prompt_table)
        self.tables[request_id] = table
        return request_id

    def step(self) -> list[StepOutput]:
        outputs = self.decoder.step()
        for output in outputs:
            if output.logits is not None:
                self.logits[output.request_id].append(output.logits[None])
        return outputs

    def cancel(self, request_id: int) -> None:
        self.decoder.cancel(request_id)

    def close(self) -> None:
        self.decoder.close()


def check(engine_dir: Path, requests: dict[str, GenerationRequest]) -> None:
    """Refuses what this engine could not answer, before minutes go into loading either; `requests`
    by where they stand. Tiles one request at a time."""
    engine = EngineDir.read(engine_dir)
    tokenizer = Tokenizer(engine.directory / layout.TOKENIZER)
    guidance = Guidance(tokenizer, engine.checkpoint_config.decoder.vocab_size)
    for where, request in requests.items():
        try:
            ticket = Ticket(request)
            compile_guide(engine, guidance, ticket)
            prepare(engine, tokenizer, ticket)
        except UserError as error:
            raise UserError(f"{engine_dir} cannot answer {where}: {error}") from None


def record(runner: Runner, requests: list[GenerationRequest]) -> Run:
    """Answers the first request to warm up and every one for the record; raises what fails. The
    files are below TMPDIR and lose their names here: their space is free when the result goes."""
    with TemporaryDirectory(prefix="nvlm_compare_") as folder:
        recorder = _Recorder(runner.decoder, Path(folder))
        recording = Runner(EngineDir.read(runner.engine.directory), runner.vision, recorder)
        _answer(recording, requests[:1])
        warm_up = len(recorder.logits)
        started = time.perf_counter()
        results = _answer(recording, requests)
        seconds = time.perf_counter() - started
        # The decoder got the requests in order, so ids are in that order too.
        ids = list(recorder.logits)[warm_up:]
        return Run(
            [
                Recording(
                    result.token_ids,
                    table.mapped() if (table := recorder.tables[request_id]) else None,
                    recorder.logits[request_id].mapped(),
                )
                for result, request_id in zip(results, ids, strict=True)
            ],
            seconds,
        )


def _answer(runner: Runner, requests: list[GenerationRequest]) -> list[GenerationResult]:
    found: dict[int, GenerationResult] = {}
    for index, result in runner.generate_batch(requests, in_order=True):
        if not isinstance(result, GenerationResult):
            raise result
        found[index] = result
    return [found[index] for index in range(len(requests))]


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
    difference, norm = torch.zeros(2, dtype=torch.float64)
    for rows in zip(found.split(_COMPARED_ROWS), expected.split(_COMPARED_ROWS), strict=True):
        a, b = rows[0].double(), rows[1].double()
        difference += (a - b).square().sum()
        norm += b.square().sum()
    return float((difference / norm).sqrt())


def report_json(engine: Run, reference: Run) -> dict[str, Any]:
    found = list(differences(engine, reference))
    return {
        "requests": [asdict(difference) for difference in found],
        "num_equal": sum(difference.first_differing_token is None for difference in found),
        "tokens_per_s": engine.tokens_per_s,
        "reference_tokens_per_s": reference.tokens_per_s,
    }
