"""What a row of the table of settings knows: how its value is checked and what each door calls it.

There are four kinds: a number, a switch, words, and biases of tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from nvlm.program.errors import UserError, shown
from nvlm.program.unicode import require_unicode

MAX_WORDS = 1000
"""So many bad words are compared with a row's last tokens in every step, at most."""
MAX_BIAS = 100.0  # OpenAI's range
_MOST_DIGITS = 20
"""Digits of a token id in JSON: no id has more, and Python makes numbers of more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A row of the table."""

    name: str  # the field of SamplingParams, run.py's flag and the JSON key
    neutral: Any  # the value that asks for nothing
    expected: str  # what values there are, in words
    help: str  # of run.py's flag
    triton_type: str  # of Triton's input
    triton_dims: tuple[int, ...] = (1,)  # of Triton's input; -1 is free
    triton_name: str = ""  # name of Triton's input; empty: `name`
    trtllm_keyword: str | None = None  # name in TensorRT-LLM's SamplingConfig
    trtllm_tensor: str | None = None  # name of the tensor in its C++ backend for Triton
    # TensorRT-LLM has it elsewhere than in SamplingConfig, or it is done without it.
    is_trtllm_elsewhere: bool = False
    trtllm_maximum: int | float | None = None  # what TensorRT-LLM clips it to, with a warning
    is_filter: bool = False  # given without a temperature it means sampling at temperature 1

    @property
    def input_name(self) -> str:
        return self.triton_name or self.name

    @property
    def flag(self) -> dict[str, Any]:
        """What argparse takes for run.py's flag; None is its value where it is not given."""
        raise NotImplementedError

    def check(self, value: Any) -> None:
        """Raises `UserError` for a value out of range or of another kind."""
        self.read(value)

    def read(self, value: Any) -> Any:
        """The value as SamplingParams holds it, from Python, JSON or a flag. Raises `UserError`
        for one out of range or of another kind."""
        raise NotImplementedError

    def to_json(self, value: Any) -> Any:
        """The value as JSON has it."""
        return value

    def refuse(self, value: Any) -> UserError:
        return UserError(f"{self.name} is {shown(value)}, expected {self.expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Number(Setting):
    minimum: int | float  # smallest value
    maximum: int | float  # largest value
    excludes_minimum: bool = False  # the smallest value is one above `minimum`
    # The value's type. It must be given where `neutral` is None, which stands for no value.
    type: type[int] | type[float]

    @property
    def flag(self) -> dict[str, Any]:
        return {"type": self.type, "help": self.help}

    def read(self, value: Any) -> Any:
        if value is None and self.neutral is None:
            return None
        numbers = Integral if self.type is int else Real
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        if not is_number:
            raise UserError(f"{self.name} is {shown(value)}, expected a number, {self.expected}")
        is_above = value > self.minimum or (value == self.minimum and not self.excludes_minimum)
        if not (is_above and value <= self.maximum):
            raise UserError(f"{self.name} is {value}, expected {self.expected}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch(Setting):
    """True or false."""

    @property
    def flag(self) -> dict[str, Any]:
        return {"action": "store_true", "default": None, "help": self.help}

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(value)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Words(Setting):
    """Strings, held as a tuple."""

    @property
    def flag(self) -> dict[str, Any]:
        return {"nargs": "+", "help": self.help}

    def read(self, value: Any) -> tuple[str, ...]:
        words = (value,) if isinstance(value, str) else value
        if not isinstance(words, Iterable) or isinstance(words, (bytes, Mapping)):
            raise self.refuse(value)
        words = tuple(words)
        if not all(isinstance(word, str) and word for word in words):
            raise self.refuse(value)
        if len(words) > MAX_WORDS:
            raise UserError(f"{self.name} has {len(words)} words, expected {MAX_WORDS} at most")
        return tuple(require_unicode(word, self.name) for word in words)

    def to_json(self, value: Any) -> list[str]:
        return list(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Biases(Setting):
    """A number for each of some tokens, held as sorted pairs (token id, number)."""

    @property
    def flag(self) -> dict[str, Any]:
        return {"type": _json_object, "metavar": "JSON", "help": self.help}

    def read(self, value: Any) -> tuple[tuple[int, float], ...]:
        pairs = value.items() if isinstance(value, Mapping) else value
        if not isinstance(pairs, Iterable) or isinstance(pairs, (str, bytes)):
            raise self.refuse(value)
        found: dict[int, float] = {}
        for pair in pairs:
            match pair:
                case (token_id, bias):
                    found[self._token_id(token_id)] = self._bias(bias, token_id)
                case _:
                    raise self.refuse(value)
        return tuple(sorted(found.items()))

    def to_json(self, value: Any) -> dict[str, float]:
        return {str(token_id): bias for token_id, bias in value}

    def _token_id(self, token_id: Any) -> int:
        is_text = isinstance(token_id, str) and token_id.isascii() and token_id.isdecimal()
        is_text = is_text and len(token_id) <= _MOST_DIGITS
        is_number = isinstance(token_id, Integral) and not isinstance(token_id, bool)
        if not (is_text or is_number) or int(token_id) < 0:
            raise UserError(f"{self.name} has token id {shown(token_id)}, expected 0 or more")
        return int(token_id)

    def _bias(self, bias: Any, token_id: Any) -> float:
        is_number = isinstance(bias, Real) and not isinstance(bias, bool)
        if not is_number or not abs(bias) <= MAX_BIAS:  # NaN is refused too
            raise UserError(
                f"{self.name} of token {token_id} is {shown(bias)}, expected {-MAX_BIAS:g} to "
                f"{MAX_BIAS:g}"
            )
        return float(bias)


def _json_object(text: str) -> Any:
    """A JSON object. Its errors are for argparse, which puts the flag before the message."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is no JSON object, expected one such as '{{\"151644\": -100}}'"
        )
    return value
