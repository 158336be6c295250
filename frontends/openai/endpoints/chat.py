"""POST /v1/chat/completions: a conversation with pictures, answered whole or piece by piece."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from frontends.openai.asking import Asked
from frontends.openai.call import Call, Events
from frontends.openai.events import (
    Chunks,
    StreamOptions,
    Usage,
    drawn_seed,
    merged,
    record_result,
    with_seed,
)
from frontends.openai.logprobs import of_chat, of_prompt
from frontends.openai.requests.fields import flag, settings_of, text_field
from frontends.openai.requests.messages import read_messages, texts_of
from runtime.requests.types import GenerationResult

_NAME = "chatcmpl"


async def chat_completions(call: Call) -> dict[str, Any] | Events:
    door, body = call.door, call.body
    model = door.require_model(text_field(body, "model"))
    options, has_timings = StreamOptions.of(body), flag(body, "return_timings")
    turns = read_messages(body)
    if door.options.logs_text:
        call.record.text["messages"] = texts_of(turns)
    settings = {"max_new_tokens": door.max_model_len, **settings_of(body, "chat")}
    request = await door.request_of(turns, settings)
    asked = door.ask(request, call.stack, in_pieces=options.is_streamed)
    if options.is_streamed:
        chunks = Chunks.of(call, _NAME, "chat.completion.chunk", model, options)
        return _events(call, asked, chunks, has_timings)
    return await _whole(call, asked, model, has_timings)


async def _whole(call: Call, asked: Asked, model: str, has_timings: bool) -> dict[str, Any]:
    result = (await asked.hear())[-1].result
    assert result is not None, "nothing else is heard of an answer that is not streamed"
    record_result(call, result)
    tokenizer = call.door.runner.tokenizer
    answer = {
        "id": call.name(_NAME),
        "object": "chat.completion",
        "created": call.created,
        "model": model,
        "choices": [
            with_seed(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": of_chat(choice.logprobs, tokenizer),
                    "finish_reason": choice.finish_reason,
                },
                choice.seed,
            )
            for index, choice in enumerate(result.choices)
        ],
        "usage": Usage.of([asked.ticket]).body,
    }
    if result.prompt_logprobs is not None:
        answer["prompt_logprobs"] = of_prompt(result.prompt_logprobs)
    return answer | (_timings(result) if has_timings else {})


async def _events(call: Call, asked: Asked, chunks: Chunks, has_timings: bool) -> Events:
    tokenizer = call.door.runner.tokenizer
    has_logprobs = asked.ticket.request.sampling.logprobs
    begun: set[int] = set()
    while True:
        pieces = await asked.hear()
        events = b""
        for piece in merged(pieces):
            delta = {"content": piece.text}
            if piece.index not in begun:
                delta = {"role": "assistant", **delta}
                begun.add(piece.index)
            choice = {
                "index": piece.index,
                "delta": delta,
                "logprobs": of_chat(piece.logprobs if has_logprobs else None, tokenizer),
                "finish_reason": piece.finish_reason,
            }
            choice = with_seed(choice, drawn_seed(asked.ticket, piece))
            events += chunks.chunk(choice, [asked])
        yield events
        if (result := pieces[-1].result) is not None:
            record_result(call, result)
            yield chunks.last([asked], _timings(result) if has_timings else {})
            return


def _timings(result: GenerationResult) -> dict[str, Any]:
    """As `run.py --json` has them."""
    return {"timings": {name: round(each, 3) for name, each in asdict(result.timings).items()}}
