"""What an answer must match: a JSON schema, any JSON object, a regular expression, a choice of
texts, or a grammar. A request has one of them at most.

`GUIDES` is the table: one row a kind. run.py's flags, the keys of a JSON line, the keywords of the
library and the words of TensorRT-LLM are read from it. What a guide means for the next token is in
runtime/decoder/guidance.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nvlm.program.errors import UserError, shown
from nvlm.program.unicode import require_unicode

GuideName = Literal["json_schema", "json_object", "regex", "choice", "grammar"]

MAX_GUIDE_BYTES = 128 << 10
"""UTF-8 bytes of a guide. OpenAI takes 120,000 characters of a schema; time to compile grows with
the square of an object's optional properties."""


@dataclass(frozen=True, slots=True)
class GuideKind:
    """A row."""

    name: GuideName  # run.py's flag, the JSON key and the library's keyword
    expected: str  # the value in words
    help: str  # of run.py's flag
    triton_type: str  # a value of TensorRT-LLM's tensor guided_decoding_guide_type, or ours
    trtllm_type: str | None  # a member of its GuidedDecodingParams.GuideType; None: it has none


GUIDES = (
    GuideKind(
        "json_schema",
        "a JSON schema: an object, or its text",
        "JSON schema that the answer must match: a file, or the schema itself",
        triton_type="json_schema",
        trtllm_type="JSON_SCHEMA",
    ),
    GuideKind(
        "json_object",
        "true or false",
        "the answer must be a JSON object",
        triton_type="json",
        trtllm_type="JSON_SCHEMA",  # its JSON is any value
    ),
    GuideKind(
        "regex",
        "a regular expression",
        "regular expression that the whole answer must match",
        triton_type="regex",
        trtllm_type="REGEX",
    ),
    GuideKind(
        "choice",
        "a list of texts, none of them empty",
        "texts, one of which must be the answer",
        triton_type="choice",
        trtllm_type="REGEX",
    ),
    GuideKind(
        "grammar",
        "a grammar in llguidance's Lark syntax",
        "Lark grammar that the answer must follow: a file, or the grammar itself",
        triton_type="grammar",
        trtllm_type=None,  # its grammars are GBNF, another language
    ),
)
GUIDE_KINDS = {kind.name: kind for kind in GUIDES}


@dataclass(frozen=True, slots=True)
class Guide:
    """What one answer must match."""

    name: GuideName  # a row of the table
    # The schema or the choices as JSON, the expression or the grammar; empty for json_object.
    text: str = ""

    @classmethod
    def of(cls, name: GuideName, value: Any) -> Guide | None:
        """A guide as a caller gives it; None where it asks for nothing.

        Raises `UserError` for a value of another type or of more than MAX_GUIDE_BYTES, and for half
        a character.
        """
        match name, value:
            case "json_object", bool():
                return cls(name) if value else None
            case "json_schema", dict():
                text = _json(name, value)
            case "choice", list() | tuple() if value and all(map(_is_text, value)):
                text = _json(name, list(value))
            case "json_schema" | "regex" | "grammar", str() if value.strip():
                text = value
            case _:
                expected = GUIDE_KINDS[name].expected
                raise UserError(f"{name} is {shown(value)}, expected {expected}")
        num_bytes = len(require_unicode(text, name).encode())
        if num_bytes > MAX_GUIDE_BYTES:
            raise UserError(
                f"{name} has {num_bytes:,} bytes, expected {MAX_GUIDE_BYTES:,} at most; leave out "
                "what the answer does not need"
            )
        return cls(name, text)

    @property
    def schema(self) -> str:
        """The JSON schema of json_schema and json_object, as text."""
        return self.text or '{"type": "object"}'

    @property
    def pattern(self) -> str:
        """The regular expression of regex and choice."""
        if self.name == "regex":
            return self.text
        return "|".join(map(_escaped, json.loads(self.text)))


def given_guide(values: Mapping[str, Any]) -> Guide | None:
    """The guide among the flags, fields or keywords of a request; None is not given.

    Raises `UserError` for two of them, and what `Guide.of` raises.
    """
    given = [(kind.name, values[kind.name]) for kind in GUIDES if values.get(kind.name) is not None]
    guides = [guide for guide in (Guide.of(*each) for each in given) if guide is not None]
    if len(guides) > 1:
        raise UserError(
            f"{guides[0].name} and {guides[1].name} are both given, and an answer is held to one; "
            "leave one out"
        )
    return guides[0] if guides else None


_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$\x00-\x1f\x7f]")


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {error}") from None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _escaped(text: str) -> str:
    """An expression that matches the text. Only what every dialect reads alike is escaped."""
    return _SPECIAL.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    return f"\\{character}" if character.isprintable() else f"\\x{ord(character):02x}"
