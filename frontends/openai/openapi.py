"""GET /openapi.json: the schema of the bodies, made from the table of fields."""

from __future__ import annotations

from typing import Any

import nvlm
from frontends.openai.requests.fields import FIELDS, Field

_MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {
                "oneOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "minItems": 1,
                        "items": {"$ref": "#/components/schemas/Part"},
                    },
                ]
            },
        },
    },
}
_PART: dict[str, Any] = {
    "oneOf": [
        {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        },
        {
            "type": "object",
            "required": ["type", "image_url"],
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {
                    "type": "object",
                    "required": ["url"],
                    "properties": {
                        "url": {"type": "string", "description": "data: URL, or http(s)"},
                        "detail": {"enum": ["auto", "low", "high"]},
                    },
                },
            },
        },
    ]
}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "a field is wrong, and `param` names it",
    "401": "the API key is missing or wrong",
    "404": "there is no such model",
    "413": "the body is too large",
    "415": "the body is not JSON by its content type",
    "429": "the queue is full; Retry-After says when to ask again",
    "500": "the server failed",
    "503": "the engine is being loaded, or the server stops",
}


def document() -> dict[str, Any]:
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    both = {"prompt": {"type": "string"}, "messages": _MESSAGES, "model": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nvlm-engine", "version": nvlm.__version__},
        "paths": {
            "/v1/chat/completions": _post(_body("chat", "messages", _MESSAGES)),
            "/v1/completions": _post(
                _body("completions", "prompt", {"type": ["string", "array"], "minLength": 1})
            ),
            "/v1/tiles": _post(
                {
                    "type": "object",
                    "required": ["messages"],
                    "properties": {
                        "messages": _MESSAGES,
                        "model": {"type": "string"},
                        "mm_processor_kwargs": {"type": "object"},
                    },
                }
            ),
            "/tokenize": _post({"type": "object", "properties": both}),
            "/detokenize": _post(
                {"type": "object", "required": ["tokens"], "properties": {"tokens": ids}}
            ),
            **{path: _get() for path in ("/v1/models", "/health", "/ping", "/version", "/metrics")},
        },
        "components": {"schemas": {"Error": _ERROR, "Part": _PART}},
    }


def _body(endpoint: str, required: str, schema: dict[str, Any]) -> dict[str, Any]:
    rows = (row for row in FIELDS if endpoint in row.endpoints)
    properties = {row.name: _schema(row) for row in rows}
    return {
        "type": "object",
        "required": [required],
        "properties": {**properties, required: schema},
    }


def _schema(row: Field) -> dict[str, Any]:
    found: dict[str, Any] = {"type": [*row.kinds, "null"]}
    if row.minimum is not None:
        found["minimum"] = row.minimum
    if row.help:
        found["description"] = row.help
    return found


def _post(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": {"description": "the answer"}, **_refusals()},
        }
    }


def _get() -> dict[str, Any]:
    return {"get": {"responses": {"200": {"description": "as it is now"}}}}


def _refusals() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        status: {"description": description, "content": content}
        for status, description in _STATUSES.items()
    }
