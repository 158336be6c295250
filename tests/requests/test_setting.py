"""Kinds of settings: what Python, JSON and flags may give for each, and how it is held."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import run
from nvlm.program.errors import UserError
from runtime.requests.request_file import request_from_json
from runtime.requests.sampling import SETTINGS, SamplingParams, non_neutral
from runtime.requests.types import GenerationRequest

GIVEN: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.5,
    "seed": 0,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": -1.0,
    "frequency_penalty": 2.0,
    "logit_bias": {"151644": -100.0, "7": 2.0},
    "bad_words": ["no", "never ever"],
    "min_tokens": 3,
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "n": 2,
    "logprobs": True,
    "top_logprobs": 4,
    "prompt_logprobs": 0,
}
HELD = SamplingParams(
    **{**GIVEN, "logit_bias": ((7, 2.0), (151644, -100.0)), "bad_words": ("no", "never ever")}
)


def of_json(**values: Any) -> SamplingParams:
    line = {"prompt": "q", **values}
    return request_from_json(line, Path(), GenerationRequest(())).sampling


def of_flags(*flags: str) -> SamplingParams:
    arguments = run.parser().parse_args(["--engine_dir", "D", "--prompt", "q", *flags])
    return run.default_request(arguments).sampling


def test_every_row_is_asked_for_here() -> None:
    assert GIVEN.keys() == {row.name for row in SETTINGS}
    assert list(non_neutral(HELD)) == [each.name for each in fields(SamplingParams)]


def test_every_door_holds_the_same() -> None:
    assert of_json(**GIVEN) == HELD
    assert GenerationRequest.images_first("q", **GIVEN).sampling == HELD
    flags = {
        **GIVEN,
        "logit_bias": '{"151644": -100, "7": 2}',
        "ignore_eos": None,
        "include_stop_str_in_output": None,
        "logprobs": None,
    }
    words: list[str] = []
    for name, value in flags.items():
        values = value if isinstance(value, list) else [value] if value is not None else []
        words += [f"--{name}", *map(str, values)]
    assert of_flags(*words) == HELD


def test_what_is_held_is_given_as_json_has_it_and_read_back() -> None:
    assert non_neutral(HELD) == GIVEN
    assert of_json(**non_neutral(HELD)) == HELD
    hash(HELD)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bad_words": [""]}, "bad_words is [''], expected a list of strings that are not empty"),
        ({"bad_words": {"a": 1}}, "bad_words is {'a': 1}, expected a list of strings"),
        ({"bad_words": 3}, "bad_words is 3, expected a list of strings"),
        ({"bad_words": ["a"] * 1001}, "bad_words has 1001 words, expected 1000 at most"),
        ({"logit_bias": [3]}, "logit_bias is [3], expected an object of token ids and numbers"),
        ({"logit_bias": "a"}, "logit_bias is 'a', expected an object"),
        ({"logit_bias": {"a": 1}}, "logit_bias has token id 'a', expected 0 or more"),
        ({"logit_bias": {"-1": 1}}, "logit_bias has token id '-1', expected 0 or more"),
        ({"logit_bias": {"3": 101}}, "logit_bias of token 3 is 101, expected -100 to 100"),
        ({"logit_bias": {"3": True}}, "logit_bias of token 3 is True, expected -100 to 100"),
        ({"logit_bias": {"3": float("nan")}}, "logit_bias of token 3 is nan, expected -100 to"),
        ({"logit_bias": {"3": 10**400}}, "logit_bias of token 3 is 1000"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias has token id '9999"),
        ({"ignore_eos": 1}, "ignore_eos is 1, expected true or false"),
        ({"logprobs": 5}, "logprobs is 5, expected true or false"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21, expected 0 to 20"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected above 0 and at most 100"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5, expected -2 to 2"),
    ],
)
def test_a_value_of_another_kind_is_refused_in_a_sentence(
    values: dict[str, Any], message: str
) -> None:
    for ask in (of_json, lambda **given: SamplingParams(**given)):
        with pytest.raises(UserError) as refused:
            ask(**values)
        assert str(refused.value).startswith(message)


@pytest.mark.parametrize("text", ["{", "3", "[1, 2]"])
def test_a_flag_that_is_no_json_object_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(UserError, match=r"--logit_bias: .* is no JSON object, expected"):
        of_flags("--logit_bias", text)


def test_a_word_alone_is_a_list_of_one() -> None:
    assert GenerationRequest.images_first("q", bad_words="no").sampling.bad_words == ("no",)


def test_a_seed_is_drawn_only_where_tokens_are_and_none_is_given() -> None:
    greedy, given = SamplingParams(), SamplingParams(temperature=1.0, seed=0)
    assert greedy.seeded() is greedy
    assert given.seeded() is given
    seeds = {SamplingParams(temperature=1.0).seeded().seed for _ in range(20)}
    assert len(seeds) == 20
