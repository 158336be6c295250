"""POST /v1/completions: text that the model continues, without a template and without pictures."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator
from typing import Any

from frontends.openai.asking import Asked
from frontends.openai.call import Call, Events
from frontends.openai.errors import FieldError
from frontends.openai.events import (
    Chunks,
    StreamOptions,
    Usage,
    drawn_seed,
    merged,
    record_result,
    with_seed,
)
from frontends.openai.logprobs import of_completion, of_prompt
from frontends.openai.requests.fields import Body, settings_of, text_field
from nvlm.program.errors import shown
from runtime.requests.messages import Message
from runtime.requests.types import Answer, GenerationRequest

_NAME = "cmpl"
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def completions(call: Call) -> dict[str, Any] | Events:
    door, body = call.door, call.body
    model = door.require_model(text_field(body, "model"))
    options = StreamOptions.of(body)
    prompts = _prompts(body, door.runner.engine.limits.max_batch_size)
    if door.options.logs_text:
        call.record.text["prompts"] = prompts
    settings = {"max_new_tokens": _DEFAULT_MAX_TOKENS, **settings_of(body, "completions")}
    asked = []
    for prompt in prompts:
        message = Message("user", (prompt,))  # text alone: no mark in it stands for a picture
        request = GenerationRequest.from_messages([message], prompt_format="raw", **settings)
        asked.append(door.ask(request, call.stack, in_pieces=options.is_streamed))
    if options.is_streamed:
        return _events(call, asked, Chunks.of(call, _NAME, "text_completion", model, options))
    return await _whole(call, asked, model)


def _prompts(body: Body, most: int) -> list[str]:
    given = body.get("prompt")
    prompts = given if isinstance(given, list) else [given]
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        raise FieldError(
            "prompt", f"prompt is {shown(given)}, expected a text or a list of texts, none empty"
        )
    if len(prompts) > most:
        raise FieldError("prompt", f"there are {len(prompts)} prompts, expected {most} at most")
    return [str(prompt) for prompt in prompts]


async def _whole(call: Call, asked: list[Asked], model: str) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    for each in asked:
        result = (await each.hear())[-1].result
        assert result is not None, "nothing else is heard of an answer that is not streamed"
        record_result(call, result)
        for choice in result.choices:
            body = {
                "index": len(choices),
                "text": choice.text,
                "logprobs": of_completion(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            choices.append(with_seed(body, choice.seed))
            if result.prompt_logprobs is not None:
                choices[-1]["prompt_logprobs"] = of_prompt(result.prompt_logprobs)
    return {
        "id": call.name(_NAME),
        "object": "text_completion",
        "created": call.created,
        "model": model,
        "choices": choices,
        "usage": Usage.of(each.ticket for each in asked).body,
    }


async def _events(call: Call, asked: list[Asked], chunks: Chunks) -> Events:
    """The choices of a prompt stand one after the other, those of the next prompt after them."""
    sampling = asked[0].ticket.request.sampling
    offsets: dict[int, int] = defaultdict(int)
    async for number, pieces in _heard(asked):
        events = b""
        for piece in merged(pieces):
            index = number * sampling.n + piece.index
            logprobs = piece.logprobs if sampling.logprobs else None
            choice = {
                "index": index,
                "text": piece.text,
                "logprobs": of_completion(logprobs, offsets[index]),
                "finish_reason": piece.finish_reason,
            }
            offsets[index] += sum(len(each.token) for each in piece.logprobs)
            choice = with_seed(choice, drawn_seed(asked[number].ticket, piece))
            events += chunks.chunk(choice, asked)
        yield events
        if (result := pieces[-1].result) is not None:
            record_result(call, result)
    yield chunks.last(asked)


async def _heard(asked: list[Asked]) -> AsyncGenerator[tuple[int, list[Answer]], None]:
    """The pieces of several answers as they come: (whose, pieces)."""
    if len(asked) == 1:
        while True:
            pieces = await asked[0].hear()
            yield 0, pieces
            if pieces[-1].is_last:
                return
    hearing = {asyncio.ensure_future(each.hear()): i for i, each in enumerate(asked)}
    try:
        while hearing:
            done, _ = await asyncio.wait(hearing, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = hearing.pop(task)
                pieces = task.result()
                yield index, pieces
                if not pieces[-1].is_last:
                    hearing[asyncio.ensure_future(asked[index].hear())] = index
    finally:
        for task in hearing:
            task.cancel()
