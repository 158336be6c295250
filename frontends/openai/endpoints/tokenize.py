"""POST /tokenize and /detokenize, as vLLM has them: text or messages to token ids, and back.

Special tokens are shown by name. The places of a picture's tiles have ids from vocab_size on, and
no text.
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
    prompt, messages = body.get("prompt"), body.get("messages")
    if (prompt is None) == (messages is None):
        raise FieldError("prompt", "give either prompt or messages")
    if messages is not None:
        request = await door.request_of(read_messages(body), settings)
    else:
        if not isinstance(prompt, str):
            raise FieldError("prompt", f"prompt is {shown(prompt)}, expected a string")
        request = GenerationRequest((prompt,), prompt_format="raw")
    token_ids = await door.prepared(request, lambda ticket: ticket.prompt_ids)
    answer = {"count": len(token_ids), "max_model_len": door.max_model_len, "tokens": token_ids}
    if has_strings:
        answer["token_strs"] = [*map(runner.tokenizer.text_of, token_ids)]
    return answer


async def detokenize(call: Call) -> dict[str, Any]:
    call.door.require_model(text_field(call.body, "model"))
    runner = call.door.runner
    vocab_size = runner.engine.checkpoint_config.decoder.vocab_size
    tokens = _token_ids(call.body, vocab_size, runner.engine.limits.max_seq_len)
    return {"prompt": runner.tokenizer.decode_with_names(tokens)}


def _token_ids(body: Body, vocab_size: int, most: int) -> list[int]:
    tokens = body.get("tokens")
    if not isinstance(tokens, list) or not all(type(each) is int and each >= 0 for each in tokens):
        raise FieldError("tokens", f"tokens is {shown(tokens)}, expected a list of token ids")
    if len(tokens) > most:
        raise FieldError("tokens", f"there are {len(tokens)} tokens, expected {most} at most")
    if tokens and (largest := max(tokens)) >= vocab_size + most:
        raise FieldError(
            "tokens",
            f"tokens has token id {shown(largest)}, expected 0 to {vocab_size - 1}, or a picture's "
            f"places from {vocab_size} on",
        )
    return tokens
