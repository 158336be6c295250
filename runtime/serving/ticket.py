"""A request on its way: one record from its acceptance to the last piece of its answer.

The stages fill it in one after the other (prepare.py, stages.py, loop.py), each from a thread of
its own if need be; nobody but the stage that has it writes to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nvlm.inputs.tiling import Grid, TiledImage
from runtime.decoder.executor import DecoderRequest, StepOutput
from runtime.decoder.guidance import CompiledGuide
from runtime.requests.boxes import parse_boxes
from runtime.requests.text_stream import TextStream
from runtime.requests.types import (
    Answer,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    Timings,
)

Listener = Callable[[Answer], None]
"""Hears every piece of an answer from one of the loop's threads, so it must return soon."""


def _nobody(_: Answer) -> None:
    """Hears nothing: for a request that is prepared and goes no further."""


@dataclass(eq=False, slots=True)
class Ticket:
    """Times are time.perf_counter's, durations seconds."""

    request: GenerationRequest
    listener: Listener = _nobody
    accepted: float = field(default_factory=time.perf_counter)
    is_cancelled: bool = False
    error: Exception | None = None  # why it does not reach the decoder

    # Prepared:
    prompt_ids: list[int] = field(init=False)  # an id from vocab_size on is a row of the table
    images: list[TiledImage] = field(default_factory=list)  # until they are encoded
    compiled_guide: CompiledGuide | None = None
    tiling_s: float = 0.0

    # Encoded:
    decoder_request: DecoderRequest = field(init=False)
    grids: list[Grid] = field(default_factory=list)
    num_tiles: int = 0
    vision_s: float = 0.0

    # With the decoder:
    stream: TextStream = field(init=False)
    submitted: float = field(init=False)
    first_token: float | None = None
    last_token: float | None = None
    token_ids: list[int] = field(default_factory=list)

    def take(self, output: StepOutput) -> Answer:
        """The piece of the answer that a step of the decoder adds."""
        if output.error is not None:
            return Answer(error=output.error)
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        text = ""
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
            text = self.stream.push(output.token_id)
        reason: FinishReason | None = "stop" if self.stream.stopped else output.finish_reason
        if reason is None:
            return Answer(text)
        text += self.stream.finish()
        return Answer(text, self._result(reason))

    def _result(self, reason: FinishReason) -> GenerationResult:
        now = time.perf_counter()
        first_token = self.first_token or now
        decode_s = now - first_token
        num_tokens = len(self.token_ids)
        return GenerationResult(
            text=self.stream.text,
            token_ids=self.token_ids,
            finish_reason=reason,
            num_prompt_tokens=len(self.prompt_ids),
            num_tokens=num_tokens,
            num_tiles=self.num_tiles,
            grids=self.grids,
            boxes=parse_boxes(self.stream.text),
            timings=Timings(
                queue_ms=1e3 * (self.submitted - self.accepted - self.tiling_s - self.vision_s),
                tiling_ms=1e3 * self.tiling_s,
                vision_ms=1e3 * self.vision_s,
                prefill_ms=1e3 * (first_token - self.submitted),
                decode_ms=1e3 * decode_s,
                total_ms=1e3 * (now - self.accepted),
                decode_tokens_per_s=(num_tokens - 1) / decode_s if num_tokens > 1 else 0.0,
            ),
        )
