"""POST /v1/chat/completions: a conversation with pictures, answered whole or piece by piece."""

from __future__ import annotations

from typing import Any

from frontends.openai.asking import Asked
from frontends.openai.call import Call, Events
from frontends.openai.errors import FieldError
from frontends.openai.events import Chunks, StreamOptions, record_result, usage
from frontends.openai.requests.fields import settings_of, text_field
from frontends.openai.requests.messages import read_messages, texts_of

_NAME = "chatcmpl"


async def chat_completions(call: Call) -> dict[str, Any] | Events:
    door, body = call.door, call.body
    model = door.require_model(text_field(body, "model"))
    options = StreamOptions.of(body)
    if "messages" not in body:
        raise FieldError("messages", "messages is missing, expected a list of messages")
    turns = read_messages(body["messages"])
    if door.options.logs_text:
        call.record.text["messages"] = texts_of(turns)
    settings = {"max_new_tokens": door.max_model_len, **settings_of(body, "chat")}
    request = await door.request_of(turns, settings)
    asked = door.ask(request, call.stack, in_pieces=options.is_streamed)
    if options.is_streamed:
        chunks = Chunks.of(call, _NAME, "chat.completion.chunk", model, options)
        return _events(call, asked, chunks)
    return await _whole(call, asked, model)


async def _whole(call: Call, asked: Asked, model: str) -> dict[str, Any]:
    result = (await asked.hear())[-1].result
    assert result is not None, "nothing else is heard of an answer that is not streamed"
    record_result(call, result)
    return {
        "id": call.name(_NAME),
        "object": "chat.completion",
        "created": call.created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": None,
                "finish_reason": result.finish_reason,
            }
        ],
        "usage": usage(result.num_prompt_tokens, result.num_tokens),
    }


async def _events(call: Call, asked: Asked, chunks: Chunks) -> Events:
    ticket = asked.ticket
    delta: dict[str, Any] = {"role": "assistant"}
    while True:
        pieces = await asked.hear()
        result = pieces[-1].result
        delta["content"] = "".join(piece.text for piece in pieces)
        choice = {"index": 0, "delta": delta, "logprobs": None}
        num_prompt_tokens, num_tokens = len(ticket.prompt_ids), len(ticket.token_ids)
        if result is None:
            yield chunks.chunk({**choice, "finish_reason": None}, num_prompt_tokens, num_tokens)
            delta = {}
            continue
        record_result(call, result)
        choice["finish_reason"] = result.finish_reason
        yield chunks.chunk(choice, num_prompt_tokens, num_tokens)
        yield chunks.last(num_prompt_tokens, num_tokens)
        return
