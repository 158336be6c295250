"""A decoder request in the words of TensorRT-LLM, for its Executor and its Triton backend alike.

Both run the same engine, so both get the same settings, extra ids and end id. How these travel,
as keywords or as tensors, is the business of the two callers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nvlm.inputs.tokenizer import IM_END, TOKENIZER_FILE, Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.executor import DecoderRequest
from runtime.decoder.image_ids import image_keys
from runtime.decoder.xgrammar_schema import check_guide
from runtime.requests.guide import GUIDE_KINDS, Guide
from runtime.requests.sampling import SETTINGS, SamplingParams, check_target, non_neutral

_OF_A_DRAW = ("temperature", "top_k", "top_p", "seed")  # without effect on greedy decoding
_NUMPY_TYPES = {"TYPE_FP32": np.float32, "TYPE_INT32": np.int32, "TYPE_UINT64": np.uint64}


def sampling_keywords(params: SamplingParams) -> dict[str, Any]:
    """The arguments of SamplingConfig. The generator is TensorRT-LLM's: a seed replays its own
    draws, not the torch executor's.

    Raises `UserError` for a setting that TensorRT-LLM does not have, or has in a smaller range.
    """
    check_target(params, "tensorrt_llm")
    values = _values(params)
    return {
        setting.trtllm_keyword: values[setting.name]
        for setting in SETTINGS
        if setting.name in values and setting.trtllm_keyword is not None
    }


def sampling_tensors(params: SamplingParams) -> dict[str, NDArray[Any]]:
    """The backend's sampling tensors, each [1, 1].

    Raises `UserError` for a setting that the backend does not have, or has in a smaller range.
    """
    tensors: dict[str, NDArray[Any]] = {}
    values = _values(params)
    for setting in SETTINGS:
        if setting.name not in values or setting.is_trtllm_elsewhere:
            continue
        if setting.trtllm_tensor is None:
            raise UserError(
                f"{setting.name} is {values[setting.name]}, and TensorRT-LLM's Triton backend has "
                "no such setting; leave it out"
            )
        dtype = _NUMPY_TYPES[setting.triton_type]
        tensors[setting.trtllm_tensor] = np.array([[values[setting.name]]], dtype)
    check_target(params, "tensorrt_llm")  # after the names, which this door words otherwise
    return tensors


def _values(params: SamplingParams) -> dict[str, Any]:
    """By our names. Greedy is top_k 1. A draw has all its settings, because the backend takes top_k
    0 without a top_p for greedy; any other setting is left out where it asks for nothing."""
    others = {name: value for name, value in non_neutral(params).items() if name not in _OF_A_DRAW}
    if params.is_greedy:
        return {"top_k": 1, **others}
    draw = {name: getattr(params, name) for name in _OF_A_DRAW}
    return draw | {"seed": params.seed or 0} | others


def embedding_bias(params: SamplingParams, vocab_size: int) -> torch.Tensor | None:
    """logit_bias as TensorRT-LLM has it: [vocab_size] float32, the type of the engine's logits."""
    if not params.logit_bias:
        return None
    token_ids, values = zip(*params.logit_bias, strict=True)
    bias = torch.zeros(vocab_size)
    bias[list(token_ids)] = torch.tensor(values, dtype=torch.float32)
    return bias


@dataclass(frozen=True, slots=True)
class XgrammarTokenizer:
    """What xgrammar, which follows TensorRT-LLM's guides, knows of a tokenizer: the arguments of
    GuidedDecodingConfig, and the keys of the file that its Triton backend reads."""

    encoded_vocab: list[str]  # in the tokenizer's own alphabet for bytes, by id
    tokenizer_str: str  # the whole of tokenizer.json
    stop_token_ids: list[int]  # without them it would take <|endoftext|>

    @classmethod
    def read(cls, tokenizer_dir: Path) -> XgrammarTokenizer:
        tokenizer = Tokenizer(tokenizer_dir)
        text = (tokenizer_dir / TOKENIZER_FILE).read_text("utf-8")
        values = json.loads(text)
        vocabulary = [""] * tokenizer.num_tokens
        for token, token_id in values["model"]["vocab"].items():
            vocabulary[token_id] = token
        for token in values["added_tokens"]:
            vocabulary[token["id"]] = token["content"]
        return cls(vocabulary, text, [tokenizer.special_id(IM_END)])


def guide_words(guide: Guide) -> tuple[str, str]:
    """The member of GuideType, and the guide. Raises `UserError` where TensorRT-LLM has none."""
    check_guide(guide, "tensorrt_llm")
    guide_type = GUIDE_KINDS[guide.name].trtllm_type
    assert guide_type is not None, "it was checked"
    return guide_type, guide.schema if guide_type == "JSON_SCHEMA" else guide.pattern


def guide_tensors(guide: Guide | None) -> dict[str, NDArray[Any]]:
    """The backend's two, each [1, 1] of bytes; none without a guide."""
    if guide is None:
        return {}
    guide_type, text = guide_words(guide)
    values = {"guided_decoding_guide_type": guide_type.lower(), "guided_decoding_guide": text}
    return {name: np.array([[value.encode()]], np.object_) for name, value in values.items()}


def end_and_stop_ids(request: DecoderRequest) -> tuple[int | None, list[int]]:
    """The one end id that TensorRT-LLM takes, the lowest, and the other ids that end an answer.

    There is no end id where logits are wanted: a streamed response has a row for each of its
    tokens, and an end id is none of them. A stop word is, and brings its row: decision 97
    (docs/decisions/engines.md).
    """
    ids = sorted(request.stop_ids)
    if request.sampling.min_tokens and (request.return_logits or len(ids) > 1):
        raise UserError(
            f"min_tokens is {request.sampling.min_tokens}, and decoder 'tensorrt_llm' holds back "
            "<|im_end|> alone; leave it out beside end ids and --compare"
        )
    if request.return_logits:
        return None, ids
    return (ids[0], ids[1:]) if ids else (None, [])


def prompt_table(request: DecoderRequest, dtype: torch.dtype) -> torch.Tensor | None:
    """[rows, hidden_size] in the engine's dtype, which TensorRT-LLM does not cast to; None where
    the request has no rows."""
    table = request.prompt_table
    return None if table is None or len(table) == 0 else table.to(dtype).contiguous()


def extra_ids(request: DecoderRequest, vocab_size: int) -> list[int]:
    """A uint64 a prompt token, which distinguishes pictures where KV blocks are found again.

    0 is TensorRT-LLM's word for no extra id and stands for text. A row of a picture has the first 8
    bytes of its cache key, little-endian, or 1 where they are 0.
    """
    return [
        int.from_bytes(key[:8].ljust(8, b"\0"), "little") or 1 if key else 0
        for key in image_keys(request, vocab_size)
    ]
