"""The whole path on one page: tile -> encode -> prompt -> table -> generate.

Owns no algorithm. Requests may be submitted at any time; those under way share every step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nvlm.formats import layout
from nvlm.inputs.tiling import Grid, TiledImage
from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.executor import (
    DecoderExecutor,
    DecoderOptions,
    DecoderRequest,
    StepOutput,
)
from runtime.engine.engine_dir import EngineDir
from runtime.engine.open_engine import open_engine
from runtime.requests.boxes import parse_boxes
from runtime.requests.text_stream import TextStream
from runtime.requests.types import (
    FinishReason,
    GenerationRequest,
    GenerationResult,
    TextDelta,
    Timings,
)
from runtime.serving.engine_parts import open_parts
from runtime.serving.prepare import PreparedRequest, prepare
from runtime.vision.executor import VisionExecutor


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """What the decoder needs of a request, and what its answer will report."""

    decoder_request: DecoderRequest
    stop: tuple[str, ...]
    grids: list[Grid]
    num_tiles: int
    started: float
    tiling_s: float
    vision_s: float


@dataclass(slots=True)
class _Answer:
    """One request under way: what was submitted and what has come back."""

    encoded: EncodedRequest
    stream: TextStream
    submitted: float
    first_token: float | None = None
    token_ids: list[int] = field(default_factory=list)


class Runner:
    def __init__(self, engine: EngineDir, vision: VisionExecutor, decoder: DecoderExecutor) -> None:
        self.engine = engine
        self.tokenizer = Tokenizer(engine.directory / layout.TOKENIZER)
        self.vision = vision
        self.decoder = decoder
        self._answers: dict[int, _Answer] = {}

    @classmethod
    def open(
        cls, engine_dir: Path, device: torch.device, options: DecoderOptions | None = None
    ) -> Runner:
        """Loads an engine directory onto a device, on one rank. (launch.py: on several, and in a
        process that is not set up for a GPU yet.)"""
        engine = open_engine(engine_dir, device)
        return cls(engine, *open_parts(engine, device, options))

    def submit(self, request: GenerationRequest) -> int:
        """Tiles and encodes the images and queues the prompt; returns the request's id.

        Raises `UserError` for a request this engine cannot answer.
        """
        return self.start(self.encode(self.prepare(request)))

    def prepare(self, request: GenerationRequest, started: float | None = None) -> PreparedRequest:
        """Tiles the images and tokenises the prompt. Any number of threads may do so at once.

        Raises `UserError` for a request this engine cannot answer.
        """
        return prepare(self.engine, self.tokenizer, request, started)

    def encode(self, prepared: PreparedRequest) -> EncodedRequest:
        """Runs the vision encoder, if there are images; then by one thread at a time, which need
        not be the decoder's."""
        begun = time.perf_counter()
        images, request = prepared.images, prepared.request
        table = self._encode(images)
        tokens_per_tile = self.engine.vision_config.tokens_per_tile
        return EncodedRequest(
            DecoderRequest(
                token_ids=prepared.prompt.token_ids,
                max_new_tokens=request.max_new_tokens,
                prompt_table=table,
                cache_keys=tuple(image.cache_key for image in images),
                rows_per_image=tuple(image.num_tiles * tokens_per_tile for image in images),
                stop_ids=request.end_ids | {self.tokenizer.special_id(IM_END)},
                sampling=request.sampling,
            ),
            stop=request.stop,
            grids=[image.grid for image in images],
            num_tiles=sum(image.num_tiles for image in images),
            started=prepared.started,
            tiling_s=prepared.tiling_s,
            vision_s=time.perf_counter() - begun,
        )

    def start(self, encoded: EncodedRequest) -> int:
        """Queues an encoded request and returns its id: like `step` and `cancel`, the decoder's
        thread only."""
        request_id = self.decoder.submit(encoded.decoder_request)
        stream = TextStream(self.tokenizer, encoded.stop)
        self._answers[request_id] = _Answer(encoded, stream, submitted=time.perf_counter())
        return request_id

    def step(self) -> list[TextDelta]:
        """One token for every request that runs; empty when there is none."""
        return [
            self._take(output)
            for output in self.decoder.step()
            if output.request_id in self._answers  # a stop string may have ended it in this step
        ]

    def cancel(self, request_id: int) -> None:
        """Frees the request's place; no more comes of it."""
        self.decoder.cancel(request_id)
        self._answers.pop(request_id, None)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        """Answers one request."""
        for _, result in self.generate_batch([request]):
            if isinstance(result, GenerationResult):
                return result
            raise result
        raise AssertionError("a batch of one gives one result")

    def generate_batch(
        self, requests: Iterable[GenerationRequest]
    ) -> Iterator[tuple[int, GenerationResult | UserError]]:
        """Answers requests as they finish: (index, result or what was wrong with the request).

        Requests are taken one by one, just ahead of a free place in the batch.
        """
        under_way: dict[int, int] = {}  # request id -> index
        remaining = enumerate(requests)
        try:
            while True:
                while len(under_way) < self.engine.limits.max_batch_size:
                    try:
                        index, request = next(remaining)
                    except StopIteration:
                        break
                    try:
                        under_way[self.submit(request)] = index
                    except UserError as error:
                        yield index, error
                if not under_way:
                    return
                for delta in self.step():
                    if isinstance(delta.error, UserError) and delta.request_id in under_way:
                        yield under_way.pop(delta.request_id), delta.error
                    elif delta.error is not None:
                        raise delta.error
                    if delta.result is not None and delta.request_id in under_way:
                        yield under_way.pop(delta.request_id), delta.result
        finally:  # the caller may stop listening
            for request_id in under_way:
                self.cancel(request_id)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.vision.close()
        self.decoder.close()

    def _encode(self, images: list[TiledImage]) -> torch.Tensor | None:
        """The prompt table [num_virtual_tokens, hidden_size]: all tiles' embeddings in order."""
        if not images:
            return None
        tiles = torch.cat([torch.from_numpy(image.tiles) for image in images])
        table = self.vision.encode(tiles).flatten(0, 1)
        if table.is_cuda:  # what is launched is not yet done, and its time is vision's
            torch.cuda.current_stream(table.device).synchronize()
        return table

    def _take(self, output: StepOutput) -> TextDelta:
        answer = self._answers[output.request_id]
        if output.error is not None:
            self.cancel(output.request_id)
            return TextDelta(output.request_id, "", None, output.error)
        if answer.first_token is None:
            answer.first_token = time.perf_counter()
        text = ""
        if output.token_id is not None:
            answer.token_ids.append(output.token_id)
            text = answer.stream.push(output.token_id)
        reason: FinishReason | None = "stop" if answer.stream.stopped else output.finish_reason
        if reason is None:
            return TextDelta(output.request_id, text, None)
        text += answer.stream.finish()
        self.cancel(output.request_id)  # a stop string ends it before the decoder knows
        return TextDelta(output.request_id, text, _result(answer, reason))


def _result(answer: _Answer, reason: FinishReason) -> GenerationResult:
    now = time.perf_counter()
    encoded, submitted = answer.encoded, answer.submitted
    first_token = answer.first_token or now
    decode_s = now - first_token
    num_tokens = len(answer.token_ids)
    return GenerationResult(
        text=answer.stream.text,
        token_ids=answer.token_ids,
        finish_reason=reason,
        num_prompt_tokens=len(encoded.decoder_request.token_ids),
        num_tokens=num_tokens,
        num_tiles=encoded.num_tiles,
        grids=encoded.grids,
        boxes=parse_boxes(answer.stream.text),
        timings=Timings(
            queue_ms=1e3 * (submitted - encoded.started - encoded.tiling_s - encoded.vision_s),
            tiling_ms=1e3 * encoded.tiling_s,
            vision_ms=1e3 * encoded.vision_s,
            prefill_ms=1e3 * (first_token - submitted),
            decode_ms=1e3 * decode_s,
            total_ms=1e3 * (now - encoded.started),
            decode_tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 else 0.0,
        ),
    )
