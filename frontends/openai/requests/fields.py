"""The fields of a body, one row each: what OpenAI's or vLLM's field is called in runtime/.

A field whose setting the runtime does not have is refused by name, unless its value asks for
nothing. A field without a row is ignored, as peers do, and reported (`unknown`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, Literal

from frontends.openai.errors import FieldError
from nvlm.program.errors import UserError, cut, shown
from nvlm.program.nearest import nearest
from runtime.requests.fields import MOST_STOPS
from runtime.requests.guide import GUIDE_KINDS
from runtime.requests.sampling import SETTINGS
from runtime.requests.types import GenerationRequest

Body = Mapping[str, Any]
Settings = dict[str, Any]
"""By the names of runtime/requests."""

Kind = Literal["integer", "number", "boolean", "string", "array", "object"]
Read = Callable[[Any], Settings]

_LENGTHS = ("max_completion_tokens", "max_tokens")
"""The fields that give max_new_tokens."""

_MOST = 2**1000  # a whole number that is still a float

_RUNTIME_NAMES = (
    {each.name for each in fields(GenerationRequest)}
    | {each.name for each in SETTINGS}
    | GUIDE_KINDS.keys()
)


@dataclass(frozen=True, slots=True)
class Field:
    """A row."""

    name: str  # JSON key
    kinds: tuple[Kind, ...]  # JSON types that the value may have
    # Makes runtime settings of a value; None: `name` is the setting's, or it is read where it is
    # used.
    read: Read | None = None
    neutral: tuple[Any, ...] = ()  # values that ask for nothing, beside null
    is_setting: bool = True  # False: the field is read where it is used
    endpoints: tuple[str, ...] = ("chat", "completions")  # that take it
    minimum: int | None = None  # smallest number; None: any
    help: str = ""  # description in the OpenAPI document

    def check(self, value: Any) -> Any:
        """The value, a whole number as an int. Raises `FieldError` for one of another kind."""
        found = _kind(value)
        if found == "integer" and "integer" not in self.kinds and "number" in self.kinds:
            found, value = "number", float(value) if abs(value) <= _MOST else math.inf
        elif found == "number" and "number" not in self.kinds and "integer" in self.kinds:
            found, value = ("integer", int(value)) if value.is_integer() else (found, value)
        if found not in self.kinds:
            raise FieldError(
                self.name, f"{self.name} is {shown(value)}, expected {' or '.join(self.kinds)}"
            )
        if self.minimum is not None and value < self.minimum:
            raise FieldError(self.name, f"{self.name} is {value}, expected {self.minimum} or more")
        return value


def settings_of(body: Body, endpoint: str) -> Settings:
    """The settings that a body gives. Raises `FieldError` for a wrong value, and for one that asks
    for what the runtime cannot do."""
    found: Settings = {}
    givers: dict[str, str] = {}  # the field that gave a setting
    for row, value in _given(body, endpoint):
        value = row.check(value)
        if any(value == each and type(value) is type(each) for each in row.neutral):
            continue
        given = _read(row, value)
        _check_settings(row, value, given)
        for name, each in given.items():
            if found.get(name, each) != each:
                other = givers[name]
                raise FieldError(
                    row.name,
                    f"{row.name} is {shown(value)} and {other} {shown(body[other])}, which are two "
                    "names of one setting; give one",
                )
            givers[name] = row.name
        found |= given
    return found


def placed(error: UserError, body: Body, endpoint: str) -> UserError:
    """The runtime's refusal, in the words of the field that it is about: its sentence begins with
    a setting's name, or says how long the prompt is."""
    if type(error) is not UserError:
        return error
    setting = str(error).partition(" ")[0]
    for row, value in _given(body, endpoint):
        with suppress(UserError):
            if setting in _read(row, row.check(value)):
                return FieldError(row.name, _of_body(_renamed(str(error), setting, row), body))
    if str(error).startswith("the prompt "):
        is_chat = endpoint == "chat" or "messages" in body
        return FieldError("messages" if is_chat else "prompt", str(error))
    return error


def _of_body(message: str, body: Body) -> str:
    """A sentence of the runtime, with the length by the name that the body has for it."""
    given = [name for name in _LENGTHS if body.get(name) is not None]
    return message.replace("max_new_tokens", given[0] if given else "max_tokens")


def unknown(body: Body, endpoint: str) -> list[str]:
    """The fields that nobody reads. Raises `FieldError` for one that would hold a picture."""
    known = {row.name for row in FIELDS if endpoint in row.endpoints}
    found = [name for name in body if name not in known]
    if isinstance(options := body.get("stream_options"), dict):
        found += [f"stream_options.{name}" for name in options if name not in STREAM_OPTIONS]
    for name in found:
        if name.lower() in PICTURE_WORDS:
            raise FieldError(
                cut(name),
                f'{name} is no field of this server; a picture is a part of a message, {{"type": '
                '"image_url", "image_url": {"url": ...}}',
            )
    return found


def _given(body: Body, endpoint: str) -> Iterator[tuple[Field, Any]]:
    """The rows of settings that a body gives, with their values."""
    for row in FIELDS:
        value = body.get(row.name)
        if value is not None and row.is_setting and endpoint in row.endpoints:
            yield row, value


def _read(row: Field, value: Any) -> Settings:
    if row.read is None:
        return {row.name: value}
    try:
        return row.read(value)
    except FieldError:
        raise
    except UserError as error:
        raise FieldError(row.name, str(error)) from None


def _check_settings(row: Field, value: Any, given: Settings) -> None:
    """Each as the runtime checks it, so that the field is named."""
    for name in given:
        if name not in _RUNTIME_NAMES:
            raise FieldError(
                row.name,
                f"{row.name} is {shown(value)}, and this server has no {name}; leave it out",
            )
    try:
        GenerationRequest.images_first("", **given)
    except UserError as error:
        setting = str(error).partition(" ")[0]
        message = _renamed(str(error), setting, row) if setting in given else str(error)
        raise FieldError(row.name, message) from None


def _renamed(message: str, setting: str, row: Field) -> str:
    """A sentence of the runtime that begins with a setting's name, with the field's in its place. A
    part of an object keeps its own."""
    return message if "object" in row.kinds else row.name + message.removeprefix(setting)


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _strings(value: Any, name: str, most: int) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise UserError(f"{name} is {shown(value)}, expected a string or a list of strings")
    if len(items) > most:
        raise UserError(f"{name} has {len(items)} strings, expected {most} at most")
    return items


def _stop(value: Any) -> Settings:
    return {"stop": tuple(filter(None, _strings(value, "stop", MOST_STOPS)))}


def _stop_token_ids(value: Any) -> Settings:
    if len(value) > MOST_STOPS or not all(_kind(each) == "integer" and each >= 0 for each in value):
        raise UserError(
            f"stop_token_ids is {shown(value)}, expected at most {MOST_STOPS} token ids from 0"
        )
    return {"end_ids": frozenset(value)}


def _logprobs_of_completions(value: Any) -> Settings:
    return {"logprobs": True, "top_logprobs": value}


def _response_format(value: Any) -> Settings:
    match value:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return {"json_schema": schema}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            raise FieldError(
                "response_format.json_schema.schema",
                f"schema is {shown(schema)}, expected an object",
            )
        case {"type": "json_schema"}:
            raise FieldError(
                "response_format.json_schema",
                'response_format has no schema, expected {"type": "json_schema", "json_schema": '
                '{"name": ..., "schema": {...}}}',
            )
    raise FieldError(
        "response_format.type",
        f"response_format is of type {shown(value.get('type'))}, expected text, json_object or "
        "json_schema",
    )


_GUIDES = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}
"""What vLLM's structured_outputs calls a guide."""


def _structured_outputs(value: Any) -> Settings:
    given = {name: each for name, each in value.items() if each is not None and each is not False}
    for name in given:
        if name not in _GUIDES:
            raise FieldError(
                f"structured_outputs.{cut(name)}",
                f"structured_outputs has {shown(name)}, expected one of {', '.join(_GUIDES)}"
                f"{nearest(name, _GUIDES)}",
            )
    if len(given) > 1:
        raise UserError(f"structured_outputs has {' and '.join(given)}; give one of them")
    return {_GUIDES[name]: each for name, each in given.items()}


_TILES = ("max_num_tiles", "max_dynamic_patch")


def _mm_processor_kwargs(value: Any) -> Settings:
    for name, number in value.items():
        if name not in _TILES:
            raise FieldError(
                f"mm_processor_kwargs.{cut(name)}",
                f"mm_processor_kwargs has {shown(name)}, expected max_num_tiles",
            )
        if _kind(number) != "integer" or number < 1:
            raise FieldError(
                f"mm_processor_kwargs.{name}", f"{name} is {shown(number)}, expected 1 or more"
            )
    if len(set(value.values())) > 1:
        raise UserError(f"mm_processor_kwargs says {' and '.join(value)}; give one of them")
    return {"max_num_tiles": next(iter(value.values()))} if value else {}


def _as(name: str) -> Read:
    """Reads a field that is a setting under another name."""
    return lambda value: {name: value}


def _number(name: str, neutral: float, **more: Any) -> Field:
    return Field(name, ("number",), neutral=(neutral,), **more)


def _integer(name: str, *neutral: int, **more: Any) -> Field:
    return Field(name, ("integer",), neutral=neutral, **more)


def _not_here(names: str, *neutral: Any, kinds: Iterable[Kind], **more: Any) -> tuple[Field, ...]:
    """Fields that are refused unless they ask for nothing."""
    return tuple(Field(each, tuple(kinds), neutral=neutral, **more) for each in names.split())


def _elsewhere(names: str, *kinds: Kind, **more: Any) -> tuple[Field, ...]:
    """Fields that are read where they are used, or change no answer."""
    return tuple(Field(each, kinds, is_setting=False, **more) for each in names.split())


_ALL = ("chat", "completions", "tiles", "tokenize", "detokenize")
_ANY: tuple[Kind, ...] = ("integer", "number", "boolean", "string", "array", "object")
_CHAT: dict[str, Any] = {"endpoints": ("chat",)}
_TEMPLATE: dict[str, Any] = {"endpoints": ("chat", "tokenize")}
_COMPLETIONS: dict[str, Any] = {"endpoints": ("completions",)}

FIELDS: tuple[Field, ...] = (
    # Length and end
    *(_integer(x, read=_as("max_new_tokens"), minimum=1, help="tokens at most") for x in _LENGTHS),
    Field("stop", ("string", "array"), _stop, help="strings that end the answer"),
    Field("stop_token_ids", ("array",), _stop_token_ids, help="tokens that end the answer"),
    _integer("min_tokens", 0),
    Field("ignore_eos", ("boolean",), neutral=(False,)),
    Field("include_stop_str_in_output", ("boolean",), neutral=(False,)),
    # Sampling
    Field("temperature", ("number",), help="0 is greedy, which is the default"),
    _number("top_p", 1.0),
    _integer("top_k", 0, -1, minimum=-1),
    Field("seed", ("integer",)),
    _number("min_p", 0.0),
    _number("repetition_penalty", 1.0),
    _number("presence_penalty", 0.0),
    _number("frequency_penalty", 0.0),
    Field("logit_bias", ("object",), neutral=({},)),
    Field("bad_words", ("array",), neutral=([],)),
    _integer("n", 1, minimum=1),
    # What the answer says of its tokens
    Field("logprobs", ("boolean",), neutral=(False,), **_CHAT),
    _integer("top_logprobs", 0, minimum=0, **_CHAT),
    _integer("logprobs", read=_logprobs_of_completions, minimum=0, **_COMPLETIONS),
    _integer("prompt_logprobs"),
    # Form of the answer
    Field("response_format", ("object",), _response_format),
    Field("structured_outputs", ("object",), _structured_outputs),
    Field("json_schema", ("object", "string"), help="as run.py calls it; one form alone"),
    Field("json_object", ("boolean",), neutral=(False,)),
    Field("regex", ("string",)),
    Field("choice", ("array",)),
    Field("grammar", ("string",)),
    Field("guided_json", ("object", "string"), _as("json_schema")),
    Field("guided_regex", ("string",), _as("regex")),
    Field("guided_choice", ("array",), _as("choice")),
    Field("guided_grammar", ("string",), _as("grammar")),
    # Pictures
    Field(
        "mm_processor_kwargs",
        ("object",),
        _mm_processor_kwargs,
        help="max_num_tiles",
        endpoints=("chat", "completions", "tiles", "tokenize"),
    ),
    # Who is next
    Field("priority", ("integer",), help="of those that wait, the smallest is next"),
    # What this server does not do
    Field("cache_salt", ("string",)),
    *_not_here("tools functions", [], kinds=("array",), **_TEMPLATE),
    *_not_here("tool_choice function_call", "none", "auto", kinds=("string", "object"), **_CHAT),
    *_not_here("modalities", ["text"], kinds=("array",), **_CHAT),
    *_not_here("audio prediction web_search_options", kinds=("object",), **_CHAT),
    *_not_here("add_generation_prompt", True, kinds=("boolean",), **_TEMPLATE),
    *_not_here("continue_final_message", False, kinds=("boolean",), **_TEMPLATE),
    *_not_here("chat_template", kinds=("string",), **_TEMPLATE),
    *_not_here("chat_template_kwargs", {}, kinds=("object",), **_TEMPLATE),
    *_not_here("documents", [], kinds=("array",), **_TEMPLATE),
    *_not_here("suffix", "", kinds=("string",)),
    *_not_here("best_of", 1, kinds=("integer",)),
    *_not_here("echo use_beam_search", False, kinds=("boolean",)),
    *_not_here("skip_special_tokens", True, kinds=("boolean",)),
    *_not_here("length_penalty", 1.0, kinds=("number",)),
    *_not_here("truncate_prompt_tokens", kinds=("integer",)),
    # Read elsewhere
    *_elsewhere("model request_id", "string", endpoints=_ALL),
    *_elsewhere("stream", "boolean"),
    *_elsewhere("stream_options", "object"),
    *_elsewhere("messages", "array", endpoints=("chat", "tiles", "tokenize")),
    Field(
        "return_timings",
        ("boolean",),
        is_setting=False,
        endpoints=("chat",),
        help="adds `timings` to the answer, or to a stream's last chunk",
    ),
    *_elsewhere("prompt", "string", "array", endpoints=("completions", "tokenize")),
    *_elsewhere("return_token_strs", "boolean", endpoints=("tokenize",)),
    *_elsewhere("tokens", "array", endpoints=("detokenize",)),
    # These change no answer
    *_elsewhere(
        "user metadata store service_tier safety_identifier prompt_cache_key "
        "prompt_cache_retention parallel_tool_calls spaces_between_special_tokens "
        "add_special_tokens",
        *_ANY,
        endpoints=_ALL,
    ),
)

STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
"""The last changes no answer."""

PICTURE_WORDS = {
    *("image", "images", "image_url", "image_urls", "image_data", "image_base64", "image_bytes"),
    *("multi_modal_data", "mm_data", "input_image", "picture", "pictures", "video", "videos"),
    *("audios", "files", "attachments"),
}
"""What other servers call a field that holds a picture."""


def flag(body: Body, name: str) -> bool:
    """A field that is true or false, false by default."""
    return bool(_one(body, name) or False)


def text_field(body: Body, name: str) -> str | None:
    found = _one(body, name)
    return None if found is None else str(found)


def object_field(body: Body, name: str) -> Body:
    return dict(_one(body, name) or {})


def _one(body: Body, name: str) -> Any:
    (row,) = (each for each in FIELDS if each.name == name)
    value = body.get(name)
    return None if value is None else row.check(value)
