"""What xgrammar, by which TensorRT-LLM follows guides, holds an answer to.

It takes every schema and ignores what it has not, so that is refused here by its keyword. Measured
on xgrammar 0.1.25, keyword by keyword: decision 122 (docs/decisions/engines.md).
"""

from __future__ import annotations

import json
from typing import Any

from nvlm.program.errors import UserError
from runtime.decoder.schema_bounds import schemas
from runtime.requests.guide import GUIDE_KINDS, Guide

_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$schema", "$id", "$comment", "$defs", "definitions"}
)
_HELD = _ANNOTATIONS | {
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems"),
    *(
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "pattern",
        "enum",
        "const",
        "anyOf",
        "$ref",
    ),
}
_ALONE = ("$ref", "anyOf", "const", "enum")
"""What stands beside them is ignored."""
_NOT_TOGETHER = (("pattern", "minLength"), ("pattern", "maxLength"))


def check_guide(guide: Guide, decoder_target: str) -> None:
    """Raises `UserError` for a guide that the engine's decoder has not, or would not hold to."""
    if decoder_target != "tensorrt_llm":
        return
    if GUIDE_KINDS[guide.name].trtllm_type is None:
        raise UserError(
            f"{guide.name} is given, and decoder 'tensorrt_llm' has no such guide; use "
            "json_schema, regex or choice, or build the engine with --decoder torch"
        )
    if guide.name == "json_schema" and (keyword := _keyword_not_held(guide)):
        raise UserError(
            f"json_schema has the keyword '{keyword}', which decoder 'tensorrt_llm' does not hold "
            "an answer to there; leave it out, or build the engine with --decoder torch"
        )


def _keyword_not_held(guide: Guide) -> str | None:
    try:
        return next(filter(None, map(_fault, schemas(json.loads(guide.text)))), None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"json_schema is no schema: {error}") from None


def _fault(schema: dict[str, Any]) -> str | None:
    if unknown := sorted(schema.keys() - _HELD):
        return unknown[0]
    for name in _ALONE:
        beside = schema.keys() - _ANNOTATIONS - {name}
        if name in schema and not (not beside or (beside == {"type"} and _agrees(schema, name))):
            return name
    for name, other in _NOT_TOGETHER:
        if name in schema and other in schema:
            return other
    if schema.get("properties") and isinstance(schema.get("additionalProperties"), dict):
        return "additionalProperties"
    return None


def _agrees(schema: dict[str, Any], name: str) -> bool:
    """The values of enum or const are of the type: of texts, as Pydantic writes an enum."""
    values = schema["enum"] if name == "enum" else [schema.get("const")]
    is_text = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return name in ("enum", "const") and schema["type"] == "string" and is_text
