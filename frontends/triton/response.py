"""From a piece of an answer to output tensors."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.requests.types import Answer, GenerationResult

_COUNTS = ("num_prompt_tokens", "num_tokens", "num_tiles")
_TIMINGS = ("queue_ms", "tiling_ms", "vision_ms", "prefill_ms", "decode_ms", "total_ms")


def output_arrays(answer: Answer, *, whole: bool) -> dict[str, NDArray[Any]]:
    """text_output [1] holds the new text, or the `whole` answer where nothing came before; reason,
    counts and timings [1, 1] come with the last piece. text_output has no batch dimension because
    TensorRT-LLM's has none and its clients index it so.
    """
    result = answer.result
    text = result.text if whole and result is not None else answer.text
    arrays: dict[str, NDArray[Any]] = {
        "text_output": np.array([text.encode()], dtype=np.object_),
        "batch_index": np.zeros((1, 1), np.int32),
        "sequence_index": np.zeros((1, 1), np.int32),
    }
    return arrays | (_last(result) if result is not None else {})


def _last(result: GenerationResult) -> dict[str, NDArray[Any]]:
    timings = asdict(result.timings)
    return {
        "finish_reason": np.array([[result.finish_reason.encode()]], dtype=np.object_),
        **{name: np.array([[getattr(result, name)]], np.int32) for name in _COUNTS},
        **{name: np.array([[timings[name]]], np.float32) for name in _TIMINGS},
    }
