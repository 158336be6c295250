"""Server-sent events of an answer, and what it used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from frontends.openai.asking import Asked
from frontends.openai.call import Call
from frontends.openai.errors import FieldError
from frontends.openai.requests.fields import STREAM_OPTIONS, Body, flag, object_field
from nvlm.program.errors import shown
from runtime.requests.types import Answer, GenerationResult
from runtime.serving.ticket import Ticket

DONE = b"data: [DONE]\n\n"


def event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    """OpenAI's `usage`: how many tokens an answer took."""

    num_prompt_tokens: int  # virtual tokens included
    num_tokens: int  # of all choices
    # Of the prompt, found in the cache; None: the decoder does not say.
    num_reused_tokens: int | None

    @classmethod
    def of(cls, tickets: Iterable[Ticket]) -> Usage:
        """Counts the usage so far of requests that are prepared."""
        tickets = list(tickets)
        reused = [each.num_reused_tokens for each in tickets]
        known = [each for each in reused if each is not None]
        return cls(
            sum(len(each.prompt_ids) for each in tickets),
            sum(each.num_tokens for each in tickets),
            sum(known) if known else None,
        )

    @property
    def body(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_tokens,
        }
        if self.num_reused_tokens is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.num_reused_tokens}
        return usage


def record_result(call: Call, result: GenerationResult) -> None:
    """Adds an answer to the line of the access log."""
    record = call.record
    if call.door.options.logs_text:
        record.text.setdefault("answers", []).extend(choice.text for choice in result.choices)
    record.num_prompt_tokens = (record.num_prompt_tokens or 0) + result.num_prompt_tokens
    record.num_tokens += result.num_tokens
    record.num_tiles = (record.num_tiles or 0) + result.num_tiles
    record.finish_reason = result.finish_reason


def with_seed(choice: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """A choice with the seed that repeats it. None: nothing was drawn, and nothing is said."""
    return choice if seed is None else {**choice, "seed": seed}


def drawn_seed(ticket: Ticket, piece: Answer) -> int | None:
    """With the last piece of each of the n answers: its seed, None where nothing was drawn."""
    sampling = ticket.sampling.with_seed_of(piece.index)
    return None if piece.finish_reason is None or sampling.is_greedy else sampling.seed


def merged(pieces: Sequence[Answer]) -> list[Answer]:
    """The pieces of each of the n answers as one, in the order in which they first came."""
    found: dict[int, Answer] = {}
    for piece in pieces:
        before = found.get(piece.index)
        if before is not None:
            piece = replace(
                piece, text=before.text + piece.text, logprobs=before.logprobs + piece.logprobs
            )
        found[piece.index] = piece
    return list(found.values())


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How an answer is sent."""

    is_streamed: bool  # piece by piece, as server-sent events
    includes_usage: bool  # as a last chunk without choices
    continuously: bool  # usage comes with every chunk

    @classmethod
    def of(cls, body: Body) -> StreamOptions:
        is_streamed, options = flag(body, "stream"), object_field(body, "stream_options")
        if options and not is_streamed:
            raise FieldError(
                "stream_options", "stream_options goes with stream true; send both, or leave it out"
            )
        if is_streamed and body.get("prompt_logprobs") is not None:
            raise FieldError(
                "prompt_logprobs", "prompt_logprobs goes with stream false; leave one out"
            )
        for name in STREAM_OPTIONS:
            if not isinstance(options.get(name, False), bool | None):
                raise FieldError(
                    f"stream_options.{name}",
                    f"{name} is {shown(options[name])}, expected true or false",
                )
        includes_usage = bool(options.get("include_usage"))
        continuously = bool(options.get("continuous_usage_stats"))
        return cls(is_streamed, includes_usage or continuously, continuously)


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks of one stream, which differ in their choices alone."""

    object: str  # OpenAI's name of a chunk
    id: str  # of the answer
    model: str  # the name that was asked for
    options: StreamOptions  # how the client wants it
    created: int  # Unix time in seconds

    @classmethod
    def of(cls, call: Call, name: str, kind: str, model: str, options: StreamOptions) -> Chunks:
        return cls(kind, call.name(name), model, options, call.created)

    def chunk(self, choice: dict[str, Any], asked: Iterable[Asked]) -> bytes:
        body = self._body([choice])
        if self.options.continuously:
            body["usage"] = _usage(asked)
        return event(body)

    def last(self, asked: Iterable[Asked], more: Mapping[str, Any] | None = None) -> bytes:
        """The end of a stream, with a chunk of its usage and of `more`, if asked for."""
        fields = dict(more or {})
        if self.options.includes_usage:
            fields["usage"] = _usage(asked)
        return event({**self._body([]), **fields}) + DONE if fields else DONE

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _usage(asked: Iterable[Asked]) -> dict[str, Any]:
    return Usage.of(each.ticket for each in asked if each.has_begun).body
