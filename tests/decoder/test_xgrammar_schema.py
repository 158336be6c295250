"""What TensorRT-LLM's guides have not is refused by name, before an engine is asked."""

from __future__ import annotations

from typing import Any

import pytest

from nvlm.program.errors import UserError
from runtime.decoder.xgrammar_schema import check_guide
from runtime.requests.guide import Guide

TEXT, NUMBER = {"type": "string"}, {"type": "number"}


def check(name: Any, value: Any, target: str = "tensorrt_llm") -> None:
    guide = Guide.of(name, value)
    assert guide is not None
    check_guide(guide, target)


@pytest.mark.parametrize(
    ("keyword", "schema"),
    [
        ("not", {"type": "string", "not": TEXT}),
        ("if", {"properties": {"a": {"if": TEXT}}}),
        ("uniqueItems", {"items": {"type": "array", "uniqueItems": True}}),
        ("multipleOf", {"type": "integer", "multipleOf": 3}),
        ("minimum", {"type": "integer", "minimum": 3}),
        ("oneOf", {"oneOf": [TEXT, NUMBER]}),
        ("allOf", {"allOf": [TEXT]}),
        ("patternProperties", {"patternProperties": {"a": TEXT}}),
        ("anyOf", {"anyOf": [TEXT, NUMBER], "maxLength": 2}),
        ("$ref", {"$ref": "#/$defs/a", "minLength": 2, "$defs": {"a": TEXT}}),
        ("enum", {"enum": ["a", 1], "type": "string"}),
        ("maxLength", {"type": "string", "pattern": "^a+$", "maxLength": 2}),
        ("additionalProperties", {"properties": {"a": TEXT}, "additionalProperties": NUMBER}),
    ],
)
def test_a_keyword_that_is_not_held_is_refused_by_name(keyword: str, schema: Any) -> None:
    with pytest.raises(UserError, match=rf"keyword '{keyword.replace('$', '.')}', which decoder"):
        check("json_schema", schema)
    check("json_schema", schema, "torch")


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "A", "type": "object", "properties": {"not": TEXT, "if": NUMBER}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"enum": ["x", "y"], "type": "string"}}},
        {"anyOf": [TEXT, {"type": "null"}], "title": "Maybe", "default": {"not": 1}},
        {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 3},
        {"type": "object", "properties": {"a": TEXT}, "additionalProperties": False},
    ],
)
def test_what_pydantic_writes_passes(schema: Any) -> None:
    check("json_schema", schema)


def test_a_grammar_is_refused_and_the_others_pass() -> None:
    with pytest.raises(UserError, match="grammar is given, and decoder 'tensorrt_llm' has no such"):
        check("grammar", 'start: "a"')
    for name, value in (("json_object", True), ("regex", "a+"), ("choice", ["a", "b"])):
        check(name, value)
