"""Requests and answers of the decoder as tensors of TensorRT-LLM 1.2.1's C++ Triton backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.decoder.executor import DecoderRequest, TokenLogprobs
from runtime.decoder.tensorrt_llm_dialect import (
    embedding_bias,
    end_and_stop_ids,
    extra_ids,
    guide_tensors,
    prompt_table,
    sampling_tensors,
)


def request_tensors(
    request: DecoderRequest, max_new_tokens: int, vocab_size: int, dtype: torch.dtype
) -> dict[str, NDArray[Any] | torch.Tensor]:
    """By the backend's names, with its batch dimension of 1.

    Ids >= vocab_size address prompt_embedding_table [1, rows, hidden_size] of the engine's dtype.
    """
    end_id, _ = end_and_stop_ids(request)  # remote_decoder.py watches for the others
    tensors: dict[str, NDArray[Any] | torch.Tensor] = {
        "input_ids": np.array([request.token_ids], np.int32),
        "input_lengths": np.array([[len(request.token_ids)]], np.int32),
        "request_output_len": np.array([[max_new_tokens]], np.int32),
        "end_id": np.array([[-1 if end_id is None else end_id]], np.int32),
        "pad_id": np.array([[end_id or 0]], np.int32),
        "streaming": np.array([[True]]),
        **sampling_tensors(request.sampling),
        **guide_tensors(request.guide),
    }
    if request.bad_words:
        tensors["bad_words_list"] = _word_list(request.bad_words)
    bias = embedding_bias(request.sampling, vocab_size)
    if bias is not None:
        tensors["embedding_bias"] = bias.numpy()[None]
    if request.sampling.logprobs:
        tensors["return_log_probs"] = np.array([[True]])
    table = prompt_table(request, dtype)
    if table is not None:
        tensors |= {
            "prompt_embedding_table": table[None],
            "prompt_vocab_size": np.array([[len(table)]], np.int32),
            "prompt_table_extra_ids": np.array([extra_ids(request, vocab_size)], np.uint64),
        }
    return tensors


def new_tokens(
    outputs: Mapping[str, NDArray[Any]],
) -> list[tuple[int, TokenLogprobs | None]]:
    """What one streamed response adds: output_ids [1, 1, n] up to sequence_length [1, 1], with the
    last of output_log_probs [1, 1, m] where those are asked for."""
    length = int(outputs["sequence_length"].reshape(-1)[0])
    ids: list[int] = outputs["output_ids"][0, 0, :length].tolist()
    if "output_log_probs" not in outputs or not ids:
        return [(token_id, None) for token_id in ids]
    logprobs = outputs["output_log_probs"].reshape(-1)[-len(ids) :].tolist()
    return [(each, TokenLogprobs(logprob)) for each, logprob in zip(ids, logprobs, strict=True)]


def _word_list(words: tuple[tuple[int, ...], ...]) -> NDArray[Any]:
    """[1, 2, n] int32: the words' ids one after the other, and where each ends, filled with -1."""
    ids = [token_id for word in words for token_id in word]
    ends = np.cumsum([len(word) for word in words])
    filled = np.full(len(ids), -1)
    filled[: len(ends)] = ends
    return np.array([[ids, filled]], np.int32)
