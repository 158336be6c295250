"""The table of sampling settings: one row says all that is particular to a setting.

run.py's flags, the keys of a JSON line, the inputs of Triton's models and the words of TensorRT-LLM
are read from it. The torch decoder does what a row means in runtime/decoder/sampler.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, TypeVar

from nvlm.program.errors import UserError, shown

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class Setting:
    """A row. `neutral` is the value that asks for nothing; its type is the setting's."""

    name: str  # the field of SamplingParams, run.py's flag, the JSON key and Triton's input
    neutral: int | float
    minimum: int | float
    maximum: int | float
    expected: str  # the range in words
    help: str
    triton_type: str
    trtllm_keyword: str | None  # of TensorRT-LLM's SamplingConfig; None: it cannot do this
    trtllm_tensor: str | None  # of its C++ backend for Triton
    trtllm_maximum: int | float | None = None  # what TensorRT-LLM clips it to, with a warning
    excludes_minimum: bool = False
    is_filter: bool = False  # given without a temperature it means sampling at temperature 1

    @property
    def type(self) -> type[int] | type[float]:
        return type(self.neutral)

    def check(self, value: Any) -> None:
        """Raises `UserError` for a value out of range, NaN included, or no number of its type."""
        numbers = Integral if self.type is int else Real
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        if not is_number:
            raise UserError(f"{self.name} is {shown(value)}, expected a number, {self.expected}")
        is_above = value > self.minimum or (value == self.minimum and not self.excludes_minimum)
        if not (is_above and value <= self.maximum):
            raise UserError(f"{self.name} is {value}, expected {self.expected}")


def _row(neutral: _Number, **columns: Any) -> _Number:
    return field(default=neutral, metadata={"neutral": neutral, **columns})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are chosen. Its fields are the rows of the table.

    temperature 0 or top_k 1 is greedy; top_k 0 and top_p 1 switch that filter off. With the same
    seed a request's tokens do not depend on what runs beside it.
    """

    temperature: float = _row(
        0.0,
        minimum=0.0,
        maximum=100.0,
        expected="0 (greedy) to 100",
        help="0 is greedy (default; 1 with --top_k or --top_p)",
        triton_type="TYPE_FP32",
        trtllm_keyword="temperature",
        trtllm_tensor="temperature",
    )
    top_k: int = _row(
        0,
        minimum=0,
        maximum=2**31 - 1,
        expected="0 (off) to 2^31 - 1",
        help="sample from the k likeliest tokens (decoder tensorrt_llm: 1024 at most)",
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
        help="sample from the likeliest tokens of this probability",
        triton_type="TYPE_FP32",
        trtllm_keyword="top_p",
        trtllm_tensor="runtime_top_p",
        excludes_minimum=True,
        is_filter=True,
    )
    seed: int = _row(
        0,
        minimum=0,
        maximum=2**64 - 1,
        expected="0 to 2^64 - 1",
        help="of the sampling",
        triton_type="TYPE_UINT64",
        trtllm_keyword="seed",
        trtllm_tensor="seed",
    )

    def __post_init__(self) -> None:
        for row in SETTINGS:
            row.check(getattr(self, row.name))

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1


SETTINGS = tuple(Setting(each.name, **each.metadata) for each in fields(SamplingParams))


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


def non_neutral(params: SamplingParams) -> dict[str, int | float]:
    """The settings that ask for something, by name, in the order of the table."""
    values = {each.name: (getattr(params, each.name), each.default) for each in fields(params)}
    return {name: value for name, (value, neutral) in values.items() if value != neutral}


def check_target(params: SamplingParams, decoder_target: str) -> None:
    """Raises `UserError` for a setting that the engine's decoder cannot do."""
    if decoder_target != "tensorrt_llm":
        return
    asked = non_neutral(params)
    for row in SETTINGS:
        if row.name in asked and row.trtllm_keyword is None:
            raise UserError(
                f"{row.name} is {asked[row.name]}, and decoder 'tensorrt_llm' has no such setting; "
                "leave it out, or build the engine with --decoder torch"
            )
        if row.trtllm_maximum is not None and asked.get(row.name, row.neutral) > row.trtllm_maximum:
            raise UserError(
                f"{row.name} is {asked[row.name]}, and decoder 'tensorrt_llm' takes "
                f"{row.trtllm_maximum} at most; lower it, or build the engine with --decoder torch"
            )
