"""A request on its way: one record from its acceptance to the last piece of its answer.

The stages fill it in one after the other (prepare.py, stages.py, loop.py), each from a thread of
its own if need be; nobody but the stage that has it writes to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nvlm.inputs.tiling import Grid, TiledImage
from nvlm.inputs.tokenizer import Tokenizer
from runtime.decoder.executor import DecoderRequest, StepOutput, TokenLogprobs
from runtime.decoder.guidance import CompiledGuide
from runtime.requests.boxes import parse_boxes
from runtime.requests.sampling import SamplingParams
from runtime.requests.text_stream import TextStream
from runtime.requests.types import (
    Answer,
    Choice,
    FinishReason,
    GenerationRequest,
    GenerationResult,
    LikelyToken,
    Timings,
    TokenLogprob,
)

Listener = Callable[[Answer], None]
"""Hears every piece of an answer from one of the loop's threads, so it must return soon."""


def _nobody(_: Answer) -> None:
    """Hears nothing: for a request that is prepared and goes no further."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its way through the loop.

    Times are time.perf_counter's, durations seconds.
    """

    request: GenerationRequest  # what was asked
    listener: Listener = _nobody  # called with each piece of the answer
    accepted: float = field(default_factory=time.perf_counter)  # when it came
    is_cancelled: bool = False  # nobody wants the answer any more
    error: Exception | None = None  # why it does not reach the decoder
    sampling: SamplingParams = field(init=False)  # the request's, with a seed if one is needed

    # Prepared:
    # Not shown: a ticket may be printed at any time.
    prompt_ids: list[int] = field(
        init=False, repr=False
    )  # an id from vocab_size on is a row of the table
    images: list[TiledImage] = field(default_factory=list, repr=False)  # until they are encoded
    cache_keys: tuple[bytes, ...] = ()  # of the images
    compiled_guide: CompiledGuide | None = None  # None: the request has no guide
    tiling_s: float = 0.0  # reading and cutting the pictures

    # Encoded:
    decoder_request: DecoderRequest = field(init=False, repr=False)
    grids: list[Grid] = field(default_factory=list)  # of each image
    num_tiles: int = 0  # of all images
    vision_s: float = 0.0  # encoding the tiles

    # With the decoder:
    drafts: list[Draft] = field(default_factory=list, repr=False)  # one for each of the n answers
    submitted: float = field(init=False, repr=False)  # when the decoder got it
    # None until the first token, or not asked for.
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_reused_tokens: int | None = None  # of the prompt, for the first draft

    def __post_init__(self) -> None:
        self.sampling = self.request.sampling.seeded()

    @property
    def num_tokens(self) -> int:
        return sum(len(draft.token_ids) for draft in self.drafts)

    def result(self) -> GenerationResult:
        """Once all drafts are whole."""
        now = time.perf_counter()
        firsts = [draft.first_token for draft in self.drafts if draft.first_token is not None]
        first_token = min(firsts, default=now)
        decode_s = now - first_token
        choices = tuple(draft.choice() for draft in self.drafts)
        num_further = self.num_tokens - len(choices)
        return GenerationResult(
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            finish_reason=choices[0].finish_reason,
            num_prompt_tokens=len(self.prompt_ids),
            num_tokens=self.num_tokens,
            num_tiles=self.num_tiles,
            grids=self.grids,
            boxes=choices[0].boxes,
            timings=Timings(
                queue_ms=1e3 * (self.submitted - self.accepted - self.tiling_s - self.vision_s),
                tiling_ms=1e3 * self.tiling_s,
                vision_ms=1e3 * self.vision_s,
                prefill_ms=1e3 * (first_token - self.submitted),
                decode_ms=1e3 * decode_s,
                total_ms=1e3 * (now - self.accepted),
                decode_tokens_per_s=num_further / decode_s if num_further > 0 else 0.0,
            ),
            seed=choices[0].seed,
            logprobs=choices[0].logprobs,
            prompt_logprobs=self.prompt_logprobs,
            num_reused_tokens=self.num_reused_tokens,
            choices=choices,
        )


@dataclass(eq=False, slots=True)
class Draft:
    """One of a request's answers while the decoder writes it."""

    ticket: Ticket  # whose answer it is
    index: int  # which of the n, from 0
    seed: int | None  # None: nothing is drawn
    tokenizer: Tokenizer  # for the texts of log probabilities
    stream: TextStream  # makes text of tokens
    first_token: float | None = None  # when it came
    last_token: float | None = None  # when the newest came
    token_ids: list[int] = field(default_factory=list)  # so far
    # One for each of `token_ids`, if asked for.
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None: it is not complete

    def take(self, output: StepOutput) -> Answer:
        """The piece of the answer that a step of the decoder adds; the request's result with the
        last piece of all."""
        if output.error is not None:
            return Answer(error=output.error)
        self.last_token = time.perf_counter()
        if self.first_token is None:
            self.first_token = self.last_token
        if output.prompt_logprobs is not None:
            self.ticket.prompt_logprobs = self._prompt_logprobs_of(output.prompt_logprobs)
        if output.num_reused_tokens is not None and self.index == 0:
            self.ticket.num_reused_tokens = output.num_reused_tokens
        text = ""
        logprobs: tuple[TokenLogprob, ...] = ()
        if output.token_id is not None:
            self.token_ids.append(output.token_id)
            may_stop = len(self.token_ids) >= self.ticket.request.sampling.min_tokens
            text = self.stream.push(output.token_id, may_stop=may_stop)
            if output.logprobs is not None:
                logprobs = (self._token_logprob(output.token_id, output.logprobs),)
                self.logprobs += logprobs
        self.finish_reason = "stop" if self.stream.stopped else output.finish_reason
        if self.finish_reason is None:
            return Answer(text, index=self.index, logprobs=logprobs)
        text += self.stream.finish()
        is_last = all(draft.finish_reason is not None for draft in self.ticket.drafts)
        return Answer(
            text,
            self.ticket.result() if is_last else None,
            index=self.index,
            finish_reason=self.finish_reason,
            logprobs=logprobs,
        )

    def choice(self) -> Choice:
        """Once it is whole."""
        assert self.finish_reason is not None, "the answer is not finished"
        return Choice(
            self.stream.text,
            self.token_ids,
            self.finish_reason,
            parse_boxes(self.stream.text),
            self.seed,
            self.logprobs if self.ticket.request.sampling.logprobs else None,
        )

    def _prompt_logprobs_of(self, found: list[TokenLogprobs | None]) -> list[TokenLogprob | None]:
        pairs = zip(self.ticket.prompt_ids, found, strict=True)
        return [
            None if each is None else self._token_logprob(token_id, each)
            for token_id, each in pairs
        ]

    def _token_logprob(self, token_id: int, found: TokenLogprobs) -> TokenLogprob:
        likeliest = [LikelyToken(each, self._text(each), logprob) for each, logprob in found.top]
        return TokenLogprob(token_id, self._text(token_id), found.logprob, likeliest)

    def _text(self, token_id: int) -> str:
        return self.tokenizer.text_of(token_id)
