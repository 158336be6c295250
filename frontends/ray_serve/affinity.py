"""Which replica has a request's KV blocks and encoded pictures, as far as its body says.

Data alone: replicas are names. A conversation keeps its key from turn to turn, since what it
begins with stays. Rendezvous hashing keeps most keys where they are when a replica comes or goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

_PROMPT_CHARACTERS = 1024
"""Characters to hash of a prompt without a template, which grows at its end: some eight blocks."""


def affinity_key(data: bytes) -> str | None:
    """The hash of what a body shares with those that follow it; None where it has nothing of the
    kind, or is no JSON object: a replica says what is wrong with it.

    Of messages it is the first picture's URL. Without a picture it is all up to the first user's
    message: a system prompt alone is on every replica soon, and would send all to one.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(body, dict):
        return None
    shared = _of_messages(body.get("messages")) or _of_prompt(body.get("prompt"))
    if shared is None:
        return None
    return hashlib.blake2b(shared.encode(errors="replace"), digest_size=16).hexdigest()


def ranks(key: str | None, num_open: Mapping[str, int | None], spill_at: int) -> list[list[str]]:
    """Replicas in the order in which they are tried; of one rank the least loaded takes the
    request.

    num_open: requests that each has open, None where that is not known. The key's own replica is
    first, until it has `spill_at` requests open.
    """
    every = list(num_open)
    if key is None or not every:
        return [every]
    own = max(every, key=lambda name: _weight(key, name))
    if (num_open[own] or 0) >= spill_at:
        return [every]
    return [[own], every]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key} {replica}".encode(), digest_size=8).digest()


def _of_messages(messages: Any) -> str | None:
    if not isinstance(messages, list) or not messages:
        return None
    if (picture := next(_pictures(messages), None)) is not None:
        return picture
    roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
    end = roles.index("user") + 1 if "user" in roles else len(messages)
    return json.dumps(messages[:end])


def _pictures(messages: list[Any]) -> Iterator[str]:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            match part:
                case {"image_url": {"url": str(url)}} | {"image_url": str(url)}:
                    yield url


def _of_prompt(prompt: Any) -> str | None:
    if isinstance(prompt, list) and prompt:
        prompt = prompt[0]
    return prompt[:_PROMPT_CHARACTERS] if isinstance(prompt, str) and prompt else None
