"""Bounds of numbers: what is accepted is held, for every spelling of the numbers around them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nvlm.inputs.tokenizer import Tokenizer
from nvlm.program.errors import UserError
from runtime.decoder.guidance import Guidance
from runtime.decoder.schema_bounds import faulty_bound
from runtime.requests.guide import Guide


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "number", "exclusiveMinimum": 4, "maximum": 4.5}, "exclusiveMinimum"),
        ({"exclusiveMinimum": 4.0, "exclusiveMaximum": 4.5}, "exclusiveMinimum"),
        ({"type": "number", "exclusiveMaximum": -4, "minimum": -4.5}, "exclusiveMaximum"),
        ({"allOf": [{"exclusiveMinimum": 4}, {"maximum": 4.5}]}, "exclusiveMinimum"),
        ({"exclusiveMinimum": 4, "anyOf": [{"maximum": 4.5}]}, "exclusiveMinimum"),
        ({"items": [{"properties": {"minimum": {"maximum": 0.1 + 0.2}}}]}, "maximum"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "exclusiveMinimum"),
    ],
)
def test_bounds_that_would_not_be_held_are_found(schema: dict[str, Any], keyword: str) -> None:
    fault = faulty_bound(schema)
    assert fault is not None
    assert fault[0] == keyword


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "exclusiveMinimum": 4, "maximum": 5},
        {"type": "number", "exclusiveMinimum": 4.5, "maximum": 4.75},
        {"type": "integer", "exclusiveMinimum": 4, "maximum": 4.5},
        {"properties": {"a": {"exclusiveMinimum": 0}, "b": {"maximum": 0.5}}},
        {"enum": [{"exclusiveMinimum": 4, "maximum": 4.5}]},
        {"properties": {"minimum": {"type": "string"}, "enum": {"const": 2**60}}},
        {"minimum": True},
    ],
)
def test_others_pass(schema: dict[str, Any]) -> None:
    assert faulty_bound(schema) is None


def random_bounds(rng: random.Random) -> dict[str, Any]:
    digits = rng.choice((1, 1, 2, 4, 5, 10, 100))
    low = rng.randrange(-12 * digits, 12 * digits) / digits
    high = low + rng.choice((0, 1, 1, 2, 3, 5, digits, digits + 1, 10 * digits)) / digits
    schema: dict[str, Any] = {"type": rng.choice(("number", "number", "integer"))}
    for names, value in (
        (("minimum", "exclusiveMinimum"), low),
        (("maximum", "exclusiveMaximum"), high),
    ):
        if name := rng.choice((*names, None)):
            schema[name] = int(value) if value == int(value) and rng.random() < 0.5 else value
    return schema


def spellings(schema: dict[str, Any]) -> set[str]:
    """Spellings of the numbers at the bounds, a little beside them, and of whole ones around."""
    found = {"0", "-0", "1"}
    for bound in [value for value in schema.values() if not isinstance(value, str)]:
        for near in (0, 0.01, -0.01, 0.5, -0.5, 1, -1):
            value = round(bound + near, 4)
            found |= {f"{value:g}", f"{value!r}0", f"{value:.2f}", f"{value:.3f}", f"{int(value)}"}
            found |= {f"{value:g}e0", f"{value / 10:g}e1", f"{value * 10:g}E-1"}
    return found


@pytest.mark.parametrize("seed", range(3))
def test_no_number_out_of_its_bounds_is_allowed(seed: int, model_dir: Path) -> None:
    tokenizer, rng = Tokenizer(model_dir), random.Random(seed)
    guidance = Guidance(tokenizer, tokenizer.num_tokens)
    num_refused = 0
    for _ in range(300):
        schema = random_bounds(rng)
        validator = jsonschema.Draft202012Validator(schema)
        try:
            compiled = guidance.compile(Guide("json_schema", json.dumps(schema)))
        except UserError:
            num_refused += 1
            continue
        for text in spellings(schema):
            if allows(compiled, tokenizer.encode(text)):
                assert validator.is_valid(json.loads(text)), (schema, text)
    assert num_refused < 100


def allows(compiled: Any, token_ids: list[int]) -> bool:
    matcher = compiled._matcher.deep_copy()
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
