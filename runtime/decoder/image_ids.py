"""What keeps the KV blocks of different pictures apart: a key of the picture, beside its tokens.

Every request numbers its virtual tokens from vocab_size, so two pictures have equal token ids. Our
blocks are found by the whole key, a SHA-256 of the pixels. TensorRT-LLM hashes (token id, extra id)
pairs; tensorrt_llm_dialect.py makes its extra ids of these keys.
"""

from __future__ import annotations

import secrets

from runtime.decoder.executor import DecoderRequest


def image_keys(request: DecoderRequest, vocab_size: int) -> list[bytes]:
    """What a prompt token is a row of: its picture's cache key, empty for text.

    Rows that no key describes get one that no other request has.
    """
    assert len(request.rows_per_image) == len(request.cache_keys), "a key and a row count an image"
    assert request.prompt_table is not None
    keys_of_rows: list[bytes] = []
    for key, num_rows in zip(request.cache_keys, request.rows_per_image, strict=True):
        keys_of_rows += [key] * num_rows
    unknown = len(request.prompt_table) - len(keys_of_rows)
    keys_of_rows += [secrets.token_bytes(32)] * unknown
    return [
        b"" if token_id < vocab_size else keys_of_rows[token_id - vocab_size]
        for token_id in request.token_ids
    ]
