"""What keeps the KV blocks of different pictures apart: one number a picture, beside its tokens.

Every request numbers its virtual tokens from vocab_size, so two pictures have equal token ids.
TensorRT-LLM hashes (token id, extra id) pairs for reuse of KV blocks: with an extra id made from
the pixels the same picture is found again and another is never taken for it.
"""

from __future__ import annotations

import secrets

from runtime.decoder.executor import DecoderRequest


def extra_ids(request: DecoderRequest, vocab_size: int) -> list[int]:
    """One number a prompt token: 0 for text, 64 bits of the cache key for a row of a picture.

    Rows that no key describes get a number that no other request has.
    """
    assert len(request.rows_per_image) == len(request.cache_keys), "a key and a row count an image"
    assert request.prompt_table is not None
    ids_of_rows: list[int] = []
    for key, num_rows in zip(request.cache_keys, request.rows_per_image, strict=True):
        ids_of_rows += [_number(key)] * num_rows
    unknown = len(request.prompt_table) - len(ids_of_rows)
    ids_of_rows += [_number(secrets.token_bytes(8))] * unknown
    return [
        0 if token_id < vocab_size else ids_of_rows[token_id - vocab_size]
        for token_id in request.token_ids
    ]


def _number(key: bytes) -> int:
    """Never 0, which means text."""
    return int.from_bytes(key[:8].ljust(8, b"\0"), "little") or 1
