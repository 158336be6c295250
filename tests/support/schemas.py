"""Random JSON schemas, expressions and choices of the kinds that a guide accepts.

Their answers are short enough to end.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

_PATTERNS = ("^[a-c]{1,5}$", "^x\\d{2,4}$", "ab?c", "^(red|green|blue)$", "^[^\\s]{3}$", "é|ß")
_FORMATS = ("date", "ipv4", "uuid")
_WORDS = ("a", "b", "name", "x y", "größe", 'quo"te', "back\\slash", "12")
_DEEPEST = 3
_ATOMS = ("a", "[a-f]", "[^\\s]", "\\d", "\\.", "é", "[0-9A-F]", "yes", "\\(", "x y")
_REPEATS = ("", "", "?", "{2}", "{1,4}", "{0,3}")
_SIGNS = "abc 019.*+?()[]{}|^$\\/\"'-äß日\t"


def random_schema(seed: int) -> Schema:
    """The same schema for the same seed; an object, an array or a scalar."""
    return _Maker(random.Random(seed)).schema(0)


def random_regex(seed: int) -> str:
    """What Python's `re` and a guide read alike."""
    rng = random.Random(seed)

    def atom(depth: int) -> str:
        if depth < 2 and rng.random() < 0.4:
            return f"({'|'.join(sequence(depth + 1) for _ in range(rng.randrange(1, 4)))})"
        return rng.choice(_ATOMS)

    def sequence(depth: int) -> str:
        pieces = (atom(depth) + rng.choice(_REPEATS) for _ in range(rng.randrange(1, 4)))
        return "".join(pieces)

    return sequence(0)


def random_choice(seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = {
        "".join(rng.choices(_SIGNS, k=rng.randrange(1, 9))) for _ in range(rng.randrange(1, 7))
    }
    return sorted(texts)


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def schema(self, depth: int) -> Schema:
        kinds = [self.string, self.integer, self.number, self.constant, self.choices, self.plain]
        if depth < _DEEPEST:
            nested = [self.object, self.array, self.tuple, self.any_of, self.all_of, self.one_of]
            kinds += [*nested, self.object, self.reference]
            if depth == 0:
                kinds = [*nested, self.reference]
        return self._rng.choice(kinds)(depth)

    def plain(self, _: int) -> Schema:
        return {"type": self._rng.choice(("boolean", "null", ["boolean", "null"]))}

    def string(self, _: int) -> Schema:
        rng, low = self._rng, self._rng.randrange(3)
        return rng.choice(
            (
                {"type": "string", "minLength": low, "maxLength": low + rng.randrange(1, 8)},
                {"type": "string", "pattern": rng.choice(_PATTERNS), "maxLength": 12},
                {"type": "string", "format": rng.choice(_FORMATS)},
                {"type": "string", "maxLength": 6},
            )
        )

    def integer(self, _: int) -> Schema:
        rng, low = self._rng, self._rng.randrange(-50, 50)
        high = low + rng.randrange(10, 300)
        return rng.choice(
            (
                {"type": "integer", "minimum": low, "maximum": high},
                {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": high},
                {"type": "integer", "minimum": 0, "maximum": 99, "multipleOf": rng.randrange(2, 9)},
            )
        )

    def number(self, _: int) -> Schema:
        low = self._rng.randrange(-9, 9) / self._rng.choice((1, 2, 4))
        names = self._rng.choice((("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")))
        return {"type": "number", names[0]: low, names[1]: low + self._rng.randrange(1, 40) / 4}

    def value(self, depth: int = 0) -> Any:
        rng = self._rng
        values = [rng.choice(_WORDS), rng.randrange(-99, 99), rng.randrange(99) / 4, True, None]
        if depth < 2:
            values += [[self.value(depth + 1)], {rng.choice(_WORDS): self.value(depth + 1)}]
        return rng.choice(values)

    def constant(self, _: int) -> Schema:
        return {"const": self.value()}

    def choices(self, _: int) -> Schema:
        return {"enum": [self.value() for _ in range(self._rng.randrange(1, 5))]}

    def object(self, depth: int) -> Schema:
        rng = self._rng
        names = rng.sample(_WORDS, rng.randrange(4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self.schema(depth + 1) for name in names},
            "additionalProperties": False,
        }
        schema["required"] = [name for name in names if rng.random() < 0.6]
        if rng.random() < 0.2:
            schema["additionalProperties"] = self.schema(_DEEPEST)
        if rng.random() < 0.2:
            schema["patternProperties"] = {"^p_[a-c]$": self.schema(_DEEPEST)}
        if schema["required"] == names and rng.random() < 0.3:
            schema["maxProperties"] = len(names) + 1
            schema["additionalProperties"] = self.schema(_DEEPEST)
        return schema

    def array(self, depth: int) -> Schema:
        low = self._rng.randrange(3)
        return {
            "type": "array",
            "items": self.schema(depth + 1),
            "minItems": low,
            "maxItems": low + self._rng.randrange(3),
        }

    def tuple(self, depth: int) -> Schema:
        items = [self.schema(depth + 1) for _ in range(self._rng.randrange(1, 4))]
        rest = self._rng.choice((False, self.schema(_DEEPEST)))
        schema = {"type": "array", "prefixItems": items, "items": rest, "maxItems": 4}
        return schema | ({"minItems": 1} if self._rng.random() < 0.5 else {})

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.schema(depth + 1) for _ in range(self._rng.randrange(1, 4))]}

    def one_of(self, _: int) -> Schema:
        """Types apart, so that no value matches two."""
        return {"oneOf": [self.string(0), self.integer(0), self.plain(0)]}

    def all_of(self, depth: int) -> Schema:
        """Parts that one value can match together."""
        if self._rng.random() < 0.5:
            return {"allOf": [{"type": "string", "maxLength": 6}, {"minLength": 2}]}
        names = self._rng.sample(_WORDS, 2)
        first, second = ({name: self.schema(depth + 1)} for name in names)
        return {
            "allOf": [
                {"type": "object", "properties": first, "required": names[:1]},
                {"properties": second, "additionalProperties": self.schema(_DEEPEST)},
            ]
        }

    def reference(self, depth: int) -> Schema:
        """Definitions have to stand at the root; a list that holds itself."""
        if depth:
            return self.integer(depth)
        node = {
            "type": "object",
            "properties": {"value": self.schema(_DEEPEST), "next": {"$ref": "#/$defs/node"}},
            "required": ["value"],
            "additionalProperties": False,
        }
        return {"$ref": "#/$defs/node", "$defs": {"node": node}}
