"""Guides: an answer drawn by their masks matches, and what cannot be followed is refused."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from nvlm.inputs.tokenizer import IM_END, Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.guidance import CompiledGuide, Guidance, Matcher, TokenMasks, apply_masks
from runtime.requests.guide import Guide, GuideName
from tests.support.schemas import random_schema

VOCAB_SIZE = 600  # padded: the tokenizer has fewer
MODEL = Path(__file__).parents[2] / "models" / "nvlm-d-tiny"
TOKENIZER = Tokenizer(MODEL)
END = TOKENIZER.special_id(IM_END)
SHORT = range(60)


@cache
def guidance() -> Guidance:
    return Guidance(TOKENIZER, VOCAB_SIZE)


@cache
def token_masks() -> TokenMasks:
    return TokenMasks(VOCAB_SIZE, torch.device("cpu"))


def compiled(name: GuideName, value: Any) -> CompiledGuide:
    guide = Guide.of(name, value)
    assert guide is not None
    return guidance().compile(guide)


def begin(name: GuideName, value: Any, stop_ids: frozenset[int] = frozenset({END})) -> Matcher:
    return compiled(name, value).start(stop_ids)


def begin_or_why(name: GuideName, value: Any) -> Matcher | str:
    try:
        return begin(name, value)
    except UserError as error:
        return str(error)


def allowed(matcher: Matcher) -> set[int]:
    (row,) = token_masks().fill([matcher])
    logits = apply_masks(torch.zeros(1, VOCAB_SIZE), [0], row[None])
    return set(torch.nonzero(logits[0] == 0)[:, 0].tolist())


def answer(matcher: Matcher, seed: int, most: int = 400) -> str | None:
    """Drawn from random logits, which like what ends things; None where it did not end."""
    generator = torch.Generator().manual_seed(seed)
    token_ids: list[int] = []
    liked = [i for i in range(VOCAB_SIZE) if TOKENIZER.bytes_of(i) in (b'"', b"}", b"]", b",")]
    while len(token_ids) < most and not matcher.is_complete:
        logits = 2 * torch.randn(1, VOCAB_SIZE, generator=generator)
        logits[0, [*liked, END]] += 3
        masked = apply_masks(logits, [0], token_masks().fill([matcher]))
        token_id = int(masked.argmax())
        if token_id == END:
            return TOKENIZER.decode(token_ids)
        token_ids.append(token_id)
        matcher.take(token_id)
        assert matcher.error is None
    return TOKENIZER.decode(token_ids) if matcher.is_complete else None


def check_random_schemas(seeds: range) -> None:
    """Nearly all end: their texts and lists are short."""
    num_ended = num_refused = 0
    for seed in seeds:
        schema = random_schema(seed)
        jsonschema.Draft202012Validator.check_schema(schema)
        matcher = begin_or_why("json_schema", schema)
        if isinstance(matcher, str):
            assert re.search("Unsatisfiable|exclusiveM", matcher), (seed, matcher)
            num_refused += 1
            continue
        text = answer(matcher, seed)
        if text is not None:
            num_ended += 1
            validate(text, schema)
    assert num_refused < 0.15 * len(seeds)
    assert num_ended > 0.95 * (len(seeds) - num_refused)


def validate(text: str, schema: dict[str, Any]) -> None:
    checker = jsonschema.FormatChecker()
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def test_answers_to_random_schemas_parse_and_validate() -> None:
    check_random_schemas(SHORT)


@pytest.mark.slow
def test_answers_to_a_thousand_random_schemas_parse_and_validate() -> None:
    check_random_schemas(range(1000))


@pytest.mark.parametrize(
    "pattern",
    ["[a-c]{1,20}", r"\d{3}-\d{4}", "(yes|no)( indeed)?", r"[^\s]{2}é?", "(?i)abc", r"x*y{2,3}"],
)
def test_answers_to_an_expression_match_it_whole(pattern: str) -> None:
    for seed in range(8):
        text = answer(begin("regex", pattern), seed)
        assert text is None or re.fullmatch(pattern, text), text


def test_an_answer_to_a_choice_is_one_of_its_texts() -> None:
    texts = ["yes", "yes, please", "no.", 'a "b" \\ c/d', "tab\t", "größer 日本", "(a|b)*", "$1^2"]
    found = {answer(begin("choice", texts), seed) for seed in range(80)}
    assert found == set(texts)


def test_an_answer_to_a_grammar_follows_it() -> None:
    grammar = 'start: NUMBER (("+" | "-") NUMBER)*\nNUMBER: /[0-9]{1,3}/'
    for seed in range(8):
        text = answer(begin("grammar", grammar), seed)
        assert text is None or re.fullmatch(r"\d{1,3}([+-]\d{1,3})*", text), text


def test_json_object_is_an_object() -> None:
    for seed in range(8):
        text = answer(begin("json_object", True), seed)
        assert text is None or isinstance(json.loads(text), dict)


def test_blanks_end() -> None:
    """A model that writes nothing but blanks where it may comes to an end."""
    matcher = begin("json_schema", {"type": "array", "maxItems": 0})
    blanks = {i for i in range(VOCAB_SIZE) if TOKENIZER.bytes_of(i).strip() == b""} - {END}
    for _ in range(60):
        if matcher.is_complete:
            break
        may = allowed(matcher)
        matcher.take(min(may & blanks or may))
    assert matcher.is_complete


def test_padding_and_special_tokens_are_never_allowed() -> None:
    special = {TOKENIZER.special_id(name) for name in ("<|endoftext|>", "<|im_start|>", IM_END)}
    may = allowed(begin("regex", "(?s:.)+"))
    assert len(may) > 300
    assert not may & special
    assert max(may) < TOKENIZER.num_tokens


def test_further_stop_ids_end_where_the_end_may_come_and_nowhere_else() -> None:
    other = TOKENIZER.encode("b")[0]  # the grammar has it in its text, too
    matcher = begin("regex", "abc?", frozenset({END, other, VOCAB_SIZE - 1}))
    (first,) = allowed(matcher)
    matcher.take(first)
    assert other not in allowed(matcher)
    matcher.take(other)
    assert allowed(matcher) >= {END, other, VOCAB_SIZE - 1}


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("not", {"not": {"type": "string"}}),
        ("uniqueItems", {"type": "array", "uniqueItems": True}),
        ("if", {"type": "object", "properties": {"a": {"if": {}, "then": {}}}}),
        ("contains", {"type": "array", "contains": {"type": "integer"}}),
        ("propertyNames", {"propertyNames": {"pattern": "a"}}),
        ("dependentRequired", {"dependentRequired": {"a": ["b"]}}),
        ("unevaluatedProperties", {"unevaluatedProperties": False}),
        ("oneOf", {"oneOf": [{"type": "number"}, {"type": "integer"}]}),
        ("regex", {"type": "string", "format": "regex"}),
        ("exclusiveMinimum", {"type": "number", "exclusiveMinimum": 4, "maximum": 4.5}),
        ("x-guidance", {"x-guidance": {"lenient": True}, "not": {}}),
    ],
)
def test_a_keyword_that_is_not_held_is_refused_by_name(keyword: str, schema: Any) -> None:
    with pytest.raises(UserError, match=keyword) as raised:
        compiled("json_schema", schema)
    assert "\n" not in str(raised.value)


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("json_schema", "{", "json_schema is no schema"),
        ("json_schema", "[1]", "expected an object"),
        ("json_schema", nested(300), "recursion limit"),
        ("json_schema", nested(3000), "recursion"),
        ("json_schema", {"enum": []}, "Unsatisfiable"),
        ("json_schema", {"type": "text"}, "Invalid type: text"),
        ("json_schema", {"$ref": "http://example.com/x"}, "not present"),
        ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "no text"),
        ("regex", "(a", "regex cannot be followed: unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", r"\bword", "lookarounds not supported"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "matches no text"),
        ("grammar", 'start: "a" b', 'unknown name: "b"'),
        ("grammar", "foo", "Expected token"),
        ("grammar", 'other: "a"', "no start rule"),
        ("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "deeply nested"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(
    name: GuideName, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        compiled(name, value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_chain_of_rules_as_long_as_a_guide_may_be_is_followed() -> None:
    """On a thread's own 8 MB llguidance would overflow the stack, and end the process."""
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(7000))
    matcher = begin("grammar", f'start: r0\n{rules}r7000: "b"')
    assert answer(matcher, 0) == "b"


def test_a_guide_that_leads_nowhere_is_an_error() -> None:
    matcher = begin("grammar", 'start: "a" x | "b"\nx: /[^\\s\\S]/')
    matcher.take(TOKENIZER.encode("a")[0])
    token_masks().fill([matcher])
    assert matcher.error == "no text that matches begins like this answer"


def test_masks_leave_a_token_to_a_row_that_has_none_left() -> None:
    """Another setting may rule out what the guide needs; then the guide is followed."""
    logits = torch.full((2, VOCAB_SIZE), -torch.inf)
    masked = apply_masks(logits, [1], token_masks().fill([begin("choice", ["a"])]))
    assert torch.isneginf(masked[0]).all()
    assert TOKENIZER.bytes_of(int(masked[1].argmax())) == b"a"
    assert torch.isneginf(logits).all(), "the model's logits stay"


def test_each_answer_has_a_matcher_of_its_own() -> None:
    guide = compiled("regex", "ab")
    first, second = guide.start(frozenset({END})), guide.start(frozenset({END}))
    first.take(TOKENIZER.encode("a")[0])
    assert allowed(first) != allowed(second)


def test_random_bytes_are_refused_or_followed() -> None:
    """No guide ends the process or escapes as another exception."""
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice('(){}[]|*+?\\^$.:/"<>%@&~ab1,\n é') for _ in range(12))
        for name in ("regex", "grammar", "json_schema"):
            prefix = "start: " if name == "grammar" else ""
            matcher = begin_or_why(name, prefix + text)  # type: ignore[arg-type]
            if isinstance(matcher, str):
                assert "\n" not in matcher
            else:
                token_masks().fill([matcher])
