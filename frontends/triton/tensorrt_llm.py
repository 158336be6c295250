"""Requests and answers of the decoder as tensors of TensorRT-LLM 1.2.1's C++ Triton backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.decoder.executor import DecoderRequest
from runtime.requests.sampling import SamplingParams


def request_tensors(
    request: DecoderRequest, max_new_tokens: int, vocab_size: int, dtype: torch.dtype
) -> dict[str, NDArray[Any] | torch.Tensor]:
    """By the backend's names, with its batch dimension of 1.

    Ids >= vocab_size address prompt_embedding_table [1, rows, hidden_size] of the engine's dtype.
    An extra id per token tells images apart where the KV cache is reused: it is 0 for text.
    """
    end_id = min(request.stop_ids, default=-1)  # it takes one; the others are watched by us
    tensors: dict[str, NDArray[Any] | torch.Tensor] = {
        "input_ids": np.array([request.token_ids], np.int32),
        "input_lengths": np.array([[len(request.token_ids)]], np.int32),
        "request_output_len": np.array([[max_new_tokens]], np.int32),
        "end_id": np.array([[end_id]], np.int32),
        "pad_id": np.array([[max(end_id, 0)]], np.int32),
        "streaming": np.array([[True]]),
        **_sampling_tensors(request.sampling),
    }
    if request.prompt_table is not None:
        table = request.prompt_table.to(dtype)
        tensors |= {
            "prompt_embedding_table": table[None].contiguous(),
            "prompt_vocab_size": np.array([[len(table)]], np.int32),
            "prompt_table_extra_ids": _extra_ids(request, vocab_size),
        }
    return tensors


def new_token_ids(outputs: Mapping[str, NDArray[Any]]) -> list[int]:
    """What one streamed response adds: output_ids [1, 1, n] up to sequence_length [1, 1]."""
    length = int(outputs["sequence_length"].reshape(-1)[0])
    ids: list[int] = outputs["output_ids"][0, 0, :length].tolist()
    return ids


def _sampling_tensors(sampling: SamplingParams) -> dict[str, NDArray[Any]]:
    """In this backend top_k 0 with top_p 0 is greedy, so an unfiltered draw has top_p 1."""
    if sampling.is_greedy:
        return {"runtime_top_k": np.array([[1]], np.int32)}
    return {
        "runtime_top_k": np.array([[sampling.top_k]], np.int32),
        "runtime_top_p": np.array([[sampling.top_p]], np.float32),
        "temperature": np.array([[sampling.temperature]], np.float32),
        "seed": np.array([[sampling.seed]], np.uint64),
    }


def _extra_ids(request: DecoderRequest, vocab_size: int) -> NDArray[np.uint64]:
    """[1, num_tokens]: the first 64 bits of its image's cache key (never 0) for a virtual token."""
    keys = [max(1, int.from_bytes(key[:8], "big")) for key in request.cache_keys]
    per_row = np.repeat(np.array(keys, np.uint64), request.rows_per_image)
    ids = np.array(request.token_ids)
    extra = np.zeros(len(ids), np.uint64)
    is_virtual = ids >= vocab_size
    extra[is_virtual] = per_row[ids[is_virtual] - vocab_size]
    return extra[None]
