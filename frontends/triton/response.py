"""From a piece of an answer to output tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.requests.types import Answer, GenerationResult, TokenLogprob

_COUNTS = ("num_prompt_tokens", "num_tokens", "num_tiles")
_TIMINGS = ("queue_ms", "tiling_ms", "vision_ms", "prefill_ms", "decode_ms", "total_ms")


def output_arrays(answer: Answer, *, whole: bool) -> dict[str, NDArray[Any]]:
    """text_output [1] holds the new text, or the `whole` answers [n] where nothing came before;
    counts and timings [1, 1] come with the last piece, a reason with the last of each answer.
    text_output has no batch dimension because TensorRT-LLM's has none and its clients index it so.
    """
    result = answer.result
    texts = [answer.text]
    logprobs: Sequence[TokenLogprob] = answer.logprobs
    if whole and result is not None:
        texts = [choice.text for choice in result.choices]
        logprobs = result.logprobs or ()
    arrays: dict[str, NDArray[Any]] = {
        "text_output": np.array([text.encode() for text in texts], dtype=np.object_),
        "batch_index": np.zeros((1, 1), np.int32),
        "sequence_index": np.array([[0 if whole else answer.index]], np.int32),
    }
    if logprobs:
        values = [[[each.logprob for each in logprobs]]]
        arrays["output_log_probs"] = np.array(values, np.float32)
        arrays["logprobs"] = _json([asdict(each) for each in logprobs])
    if answer.finish_reason is not None:
        arrays["finish_reason"] = _text(answer.finish_reason)
    return arrays | (_last(result, answer.index, whole=whole) if result is not None else {})


def _last(result: GenerationResult, index: int, *, whole: bool) -> dict[str, NDArray[Any]]:
    choice = result.choices[0 if whole else index]
    timings = asdict(result.timings)
    arrays = {
        "finish_reason": _text(choice.finish_reason),
        **{name: np.array([[getattr(result, name)]], np.int32) for name in _COUNTS},
        **{name: np.array([[timings[name]]], np.float32) for name in _TIMINGS},
    }
    if choice.seed is not None:
        arrays["seed"] = np.array([[choice.seed]], np.uint64)
    if choice.logprobs is not None:
        total = sum(each.logprob for each in choice.logprobs)
        arrays["cum_log_probs"] = np.array([[total]], np.float32)
    if result.prompt_logprobs is not None:
        tokens = [None if each is None else asdict(each) for each in result.prompt_logprobs]
        arrays["prompt_logprobs"] = _json(tokens)
    if len(result.choices) > 1:
        arrays["choices"] = _json([asdict(each) for each in result.choices])
    return arrays


def _text(text: str) -> NDArray[Any]:
    return np.array([[text.encode()]], dtype=np.object_)


def _json(values: Any) -> NDArray[Any]:
    return _text(json.dumps(values, ensure_ascii=False))
