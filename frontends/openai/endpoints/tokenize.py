"""POST /tokenize and /detokenize, as vLLM has them: text or messages to token ids, and back.

The places of a picture's tiles have ids from vocab_size on.
"""

from __future__ import annotations

from typing import Any

from frontends.openai.call import Call
from frontends.openai.errors import FieldError
from frontends.openai.requests.fields import Body, flag, settings_of, text_field
from frontends.openai.requests.messages import read_messages
from nvlm.program.errors import shown
from runtime.requests.types import GenerationRequest


async def tokenize(call: Call) -> dict[str, Any]:
    door, body = call.door, call.body
    door.require_model(text_field(body, "model"))
    runner = door.runner
    settings = settings_of(body, "tokenize")
    has_strings = flag(body, "return_token_strs")
    if ("prompt" in body) == ("messages" in body):
        raise FieldError("prompt", "give either prompt or messages")
    if "messages" in body:
        request = await door.request_of(read_messages(body), settings)
    else:
        if not isinstance(body["prompt"], str):
            raise FieldError("prompt", f"prompt is {shown(body['prompt'])}, expected a string")
        request = GenerationRequest((body["prompt"],), prompt_format="raw")
    token_ids = await door.prepared(request, lambda ticket: ticket.prompt_ids)
    answer = {"count": len(token_ids), "max_model_len": door.max_model_len, "tokens": token_ids}
    if has_strings:
        tokenizer = runner.tokenizer
        answer["token_strs"] = [tokenizer.decode([token_id]) for token_id in token_ids]
    return answer


async def detokenize(call: Call) -> dict[str, Any]:
    call.door.require_model(text_field(call.body, "model"))
    runner = call.door.runner
    tokens = _token_ids(call.body, runner.engine.limits.max_seq_len)
    return {"prompt": runner.tokenizer.decode(tokens)}


def _token_ids(body: Body, most: int) -> list[int]:
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(type(each) is int and each >= 0 for each in tokens):
        raise FieldError("tokens", f"tokens is {shown(tokens)}, expected a list of token ids")
    if len(tokens) > most:
        raise FieldError("tokens", f"there are {len(tokens)} tokens, expected {most} at most")
    return tokens
