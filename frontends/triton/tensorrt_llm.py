"""Requests and answers of the decoder as tensors of TensorRT-LLM 1.2.1's C++ Triton backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.decoder.executor import DecoderRequest
from runtime.decoder.tensorrt_llm_dialect import (
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
    table = prompt_table(request, dtype)
    if table is not None:
        tensors |= {
            "prompt_embedding_table": table[None],
            "prompt_vocab_size": np.array([[len(table)]], np.int32),
            "prompt_table_extra_ids": np.array([extra_ids(request, vocab_size)], np.uint64),
        }
    return tensors


def new_token_ids(outputs: Mapping[str, NDArray[Any]]) -> list[int]:
    """What one streamed response adds: output_ids [1, 1, n] up to sequence_length [1, 1]."""
    length = int(outputs["sequence_length"].reshape(-1)[0])
    ids: list[int] = outputs["output_ids"][0, 0, :length].tolist()
    return ids
