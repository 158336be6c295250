"""Log probabilities as OpenAI writes them, of chat and of completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvlm.inputs.tokenizer import Tokenizer
from runtime.requests.types import LikelyToken, TokenLogprob

Given = Sequence[TokenLogprob] | None


def of_chat(given: Given, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """None where none were asked for."""
    if given is None:
        return None
    content = [
        {
            **_token(each, tokenizer),
            "top_logprobs": [_token(likely, tokenizer) for likely in each.top_logprobs],
        }
        for each in given
    ]
    return {"content": content, "refusal": None}


def of_completion(given: Given, offset: int = 0) -> dict[str, Any] | None:
    """offset: characters of the answer before these tokens."""
    if given is None:
        return None
    offsets = []
    for each in given:
        offsets.append(offset)
        offset += len(each.token)
    return {
        "tokens": [each.token for each in given],
        "token_logprobs": [each.logprob for each in given],
        "top_logprobs": [
            {likely.token: likely.logprob for likely in (*each.top_logprobs, each)}
            for each in given
        ],
        "text_offset": offsets,
    }


def of_prompt(given: Sequence[TokenLogprob | None] | None) -> list[dict[str, Any] | None] | None:
    """As vLLM has them: by token id, None where nothing foretells a token."""
    if given is None:
        return None
    return [None if each is None else _by_id((*each.top_logprobs, each)) for each in given]


def _by_id(tokens: Sequence[LikelyToken]) -> dict[str, Any]:
    return {
        str(each.token_id): {"logprob": each.logprob, "decoded_token": each.token}
        for each in tokens
    }


def _token(each: LikelyToken, tokenizer: Tokenizer) -> dict[str, Any]:
    data = tokenizer.bytes_of(each.token_id)  # a special token has none
    return {"token": each.token, "logprob": each.logprob, "bytes": list(data) or None}
