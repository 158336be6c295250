"""The table of sampling settings: one row says all that is particular to a setting.

run.py's flags, the keys of a JSON line, the inputs of Triton's models and the words of TensorRT-LLM
are read from it. What a row means to the torch decoder is in runtime/decoder: logits_processors.py,
sampler.py and logprobs.py, in this order.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from nvlm.program.errors import UserError
from runtime.requests.setting import Biases, Number, Setting, Switch, Words

MAX_TOP_LOGPROBS = 20  # OpenAI's
NUM_SEEDS = 2**64
_DRAWN_SEED_BITS = 32  # a drawn seed is a number that every client's JSON holds exactly

_Value = TypeVar("_Value")


def _row(neutral: _Value, kind: type[Setting] = Number, **columns: Any) -> _Value:
    if kind is Number:
        columns = {"type": type(neutral), **columns}
    return field(default=neutral, metadata={"kind": kind, "neutral": neutral, **columns})


def _switch(**columns: Any) -> bool:
    return _row(False, Switch, expected="true or false", triton_type="TYPE_BOOL", **columns)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen, and what is returned of them. The fields are the rows of
    the table.

    temperature 0 or top_k 1 is greedy; top_k 0 and top_p 1 switch that filter off. With the same
    seed a request's tokens do not depend on what runs beside it; without one they differ from one
    request to the next (`seeded`). Order of the effects: docs/decisions/decoder.md, 114.
    """

    temperature: float = _row(
        0.0,
        minimum=0.0,
        maximum=100.0,
        expected="0 (greedy) to 100",
        help="divides the logits; 0 to 100, 0 is greedy (default: 0; 1 with --top_k, --top_p or "
        "--min_p)",
        triton_type="TYPE_FP32",
        trtllm_keyword="temperature",
        trtllm_tensor="temperature",
    )
    top_k: int = _row(
        0,
        minimum=0,
        maximum=2**31 - 1,
        expected="0 (off) to 2^31 - 1",
        help="sample from the k likeliest tokens; 0 is off (decoder tensorrt_llm: 1024 at most)",
        triton_type="TYPE_INT32",
        trtllm_keyword="top_k",
        trtllm_tensor="runtime_top_k",
        trtllm_maximum=1024,
        is_filter=True,
    )
    top_p: float = _row(
        1.0,
        minimum=0.0,
        maximum=1.0,
        expected="above 0 and at most 1 (off)",
        help="sample from the likeliest tokens of this total probability; above 0, 1 is off",
        triton_type="TYPE_FP32",
        trtllm_keyword="top_p",
        trtllm_tensor="runtime_top_p",
        excludes_minimum=True,
        is_filter=True,
    )
    seed: int | None = _row(
        None,
        type=int,
        minimum=0,
        maximum=NUM_SEEDS - 1,
        expected="0 to 2^64 - 1",
        help="seed that repeats a sampled answer (default: drawn anew, and the answer names it)",
        triton_type="TYPE_UINT64",
        trtllm_keyword="seed",
        trtllm_tensor="seed",
    )
    min_p: float = _row(
        0.0,
        minimum=0.0,
        maximum=1.0,
        expected="0 (off) to 1",
        help="sample from tokens of at least this part of the likeliest one's probability; 0 to 1",
        triton_type="TYPE_FP32",
        trtllm_keyword="min_p",
        is_filter=True,
    )
    repetition_penalty: float = _row(
        1.0,
        minimum=0.0,
        maximum=100.0,
        expected="above 0 and at most 100 (1 is off)",
        help="divides the logits of tokens in prompt or answer; above 1 makes them less likely "
        "(Hugging Face's)",
        triton_type="TYPE_FP32",
        trtllm_keyword="repetition_penalty",
        trtllm_tensor="repetition_penalty",
        excludes_minimum=True,
    )
    presence_penalty: float = _row(
        0.0,
        minimum=-2.0,
        maximum=2.0,
        expected="-2 to 2 (0 is off)",
        help="subtracted once from the logit of each token in the answer; -2 to 2 (OpenAI's)",
        triton_type="TYPE_FP32",
        trtllm_keyword="presence_penalty",
        trtllm_tensor="presence_penalty",
    )
    frequency_penalty: float = _row(
        0.0,
        minimum=-2.0,
        maximum=2.0,
        expected="-2 to 2 (0 is off)",
        help="subtracted from a token's logit for each time that it is in the answer; -2 to 2 "
        "(OpenAI's)",
        triton_type="TYPE_FP32",
        trtllm_keyword="frequency_penalty",
        trtllm_tensor="frequency_penalty",
    )
    logit_bias: tuple[tuple[int, float], ...] = _row(
        (),
        Biases,
        expected="an object of token ids and numbers from -100 to 100",
        help="numbers from -100 to 100, added to the logits of token ids: '{\"151644\": -100}'",
        triton_type="TYPE_STRING",
        is_trtllm_elsewhere=True,  # Request's embedding_bias
    )
    bad_words: tuple[str, ...] = _row(
        (),
        Words,
        expected="a list of strings that are not empty",
        help="strings that never appear in the answer, with and without a space before",
        triton_type="TYPE_STRING",
        triton_dims=(-1,),
        is_trtllm_elsewhere=True,  # Request's bad_words
    )
    min_tokens: int = _row(
        0,
        minimum=0,
        maximum=2**31 - 1,
        expected="0 to max_new_tokens",
        help="the answer has at least so many tokens",
        triton_type="TYPE_INT32",
        trtllm_keyword="min_tokens",
        trtllm_tensor="min_tokens",
    )
    ignore_eos: bool = _switch(
        help="do not end at <|im_end|>: the answer has max_new_tokens tokens, or as many as fit",
        is_trtllm_elsewhere=True,  # no end id
    )
    include_stop_str_in_output: bool = _switch(
        help="keep the stop string at the end of the answer", is_trtllm_elsewhere=True
    )
    n: int = _row(
        1,
        minimum=1,
        maximum=2**31 - 1,
        expected="1 to the engine's max_batch_size",
        help="number of answers, the i-th with --seed + i; the prompt is computed once",
        triton_type="TYPE_INT32",
        is_trtllm_elsewhere=True,  # so many requests
    )
    logprobs: bool = _switch(
        help="give the log probability of each token of the answer",
        triton_name="return_log_probs",
        is_trtllm_elsewhere=True,  # OutputConfig's return_log_probs
    )
    top_logprobs: int = _row(
        0,
        minimum=0,
        maximum=MAX_TOP_LOGPROBS,
        expected=f"0 to {MAX_TOP_LOGPROBS}",
        help="number of likeliest tokens to list at each place, with --logprobs; 0 to 20",
        triton_type="TYPE_INT32",
    )
    prompt_logprobs: int | None = _row(
        None,
        type=int,
        minimum=0,
        maximum=MAX_TOP_LOGPROBS,
        expected=f"0 to {MAX_TOP_LOGPROBS}",
        help="give the log probabilities of the prompt's tokens, and so many likeliest tokens at "
        "each place; 0 to 20",
        triton_type="TYPE_INT32",
    )

    def __post_init__(self) -> None:
        for row in SETTINGS:
            value = getattr(self, row.name)
            if value is not row.neutral:
                object.__setattr__(self, row.name, row.read(value))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def has_penalty(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def seeded(self) -> SamplingParams:
        """Itself, with a seed drawn where its tokens are drawn and it has none."""
        if self.is_greedy or self.seed is not None:
            return self
        return replace(self, seed=secrets.randbits(_DRAWN_SEED_BITS))

    def with_seed_of(self, index: int) -> SamplingParams:
        """The settings of the answer `index` of n."""
        if self.seed is None or index == 0:
            return self
        return replace(self, seed=(self.seed + index) % NUM_SEEDS)


def _setting(name: str, *, kind: type[Setting], **columns: Any) -> Setting:
    return kind(name=name, **columns)


SETTINGS = tuple(_setting(each.name, **each.metadata) for each in fields(SamplingParams))


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings among the flags or fields of a request; None is not given."""
    return {row.name: values[row.name] for row in SETTINGS if values.get(row.name) is not None}


def with_sampling(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """A filter without a temperature means sampling at temperature 1.

    Raises `UserError` for a value out of range.
    """
    has_filter = any(row.is_filter and row.name in given for row in SETTINGS)
    if defaults.temperature == 0.0 and has_filter:
        given = {"temperature": 1.0, **given}
    return replace(defaults, **given)


def non_neutral(params: SamplingParams) -> dict[str, Any]:
    """The settings that ask for something, by name, in the order of the table; as JSON has them."""
    asked = {each.name: getattr(params, each.name) for each in fields(params)}
    asked = {
        each.name: asked[each.name] for each in fields(params) if asked[each.name] != each.default
    }
    rows = {row.name: row for row in SETTINGS}
    return {name: rows[name].to_json(v) if name in rows else v for name, v in asked.items()}


def require_consistent(params: SamplingParams, max_new_tokens: int) -> None:
    """Raises `UserError` for settings that contradict each other."""
    if params.top_logprobs and not params.logprobs:
        raise UserError(
            f"top_logprobs is {params.top_logprobs} without logprobs; ask for logprobs too"
        )
    if params.n > 1 and params.is_greedy:
        raise UserError(
            f"n is {params.n} and the sampling is greedy, which gives one answer {params.n} times; "
            "give a temperature above 0 (and no top_k 1), or leave n out"
        )
    if params.min_tokens and params.min_tokens > max_new_tokens:
        raise UserError(
            f"min_tokens is {params.min_tokens} and max_new_tokens {max_new_tokens}; lower the one "
            "or raise the other"
        )


def require_places(params: SamplingParams, max_batch_size: int) -> None:
    """Raises `UserError` for more answers than the engine has places for."""
    if params.n > max_batch_size:
        raise UserError(
            f"n is {params.n} and the engine's max_batch_size {max_batch_size}: all answers are "
            "written at once; ask for fewer, or build it with a larger --max_batch_size"
        )


def require_vocabulary(params: SamplingParams, end_ids: Set[int], vocab_size: int) -> None:
    """Raises `UserError` for a bias of a token, or an end token, that the model does not have."""
    biased = {token_id for token_id, _ in params.logit_bias}
    for name, token_ids in (("logit_bias", biased), ("end_ids", end_ids)):
        if token_ids and (largest := max(token_ids)) >= vocab_size:
            raise UserError(f"{name} has token id {largest}, expected 0 to {vocab_size - 1}")


def check_target(params: SamplingParams, decoder_target: str) -> None:
    """Raises `UserError` for a setting that the engine's decoder cannot do."""
    if decoder_target != "tensorrt_llm":
        return
    asked = non_neutral(params)
    for row in SETTINGS:
        if row.name not in asked:
            continue
        value = asked[row.name]
        if row.trtllm_keyword is None and not row.is_trtllm_elsewhere:
            raise UserError(
                f"{row.name} is {value}, and decoder 'tensorrt_llm' has no such setting; "
                "leave it out, or build the engine with --decoder torch"
            )
        if row.trtllm_maximum is not None and value > row.trtllm_maximum:
            raise UserError(
                f"{row.name} is {value}, and decoder 'tensorrt_llm' takes "
                f"{row.trtllm_maximum} at most; lower it, or build the engine with --decoder torch"
            )
