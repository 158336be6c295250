"""OpenAI's messages as the runtime's.

The parts of a message keep the client's order, and a newline stands between neighbours: a picture
and a question are the published prompt (decision 125, docs/decisions/openai.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from frontends.openai.errors import FieldError
from frontends.openai.requests.fields import PICTURE_WORDS, Body
from frontends.openai.requests.pictures import Picture, read_picture
from nvlm.inputs.prompt import Role
from nvlm.program.errors import UserError, shown
from nvlm.program.unicode import require_unicode
from runtime.requests.messages import Content, ImageSource, Message, conversation

_ROLES: dict[Any, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_READ = {"role", "content"}
_CALLS = ("tool_calls", "function_call", "audio")
MAX_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class Turn:
    """A message whose pictures are not read yet."""

    role: Role  # system, user or assistant
    parts: tuple[str | Picture, ...]  # text and pictures, in order


def read_messages(body: Body) -> tuple[Turn, ...]:
    """Those of a body. Raises `FieldError` for what is no conversation, or holds more than text and
    pictures."""
    if "messages" not in body:
        raise FieldError("messages", "messages is missing, expected a list of messages")
    given = body["messages"]
    if not isinstance(given, list):
        raise FieldError("messages", f"messages is {shown(given)}, expected a list of messages")
    if len(given) > MAX_MESSAGES:
        raise FieldError(
            "messages", f"there are {len(given)} messages, expected {MAX_MESSAGES} at most"
        )
    turns = tuple(_turn(message, f"messages[{i}]") for i, message in enumerate(given))
    try:
        conversation([Message(turn.role, ()) for turn in turns])
    except UserError as error:
        raise FieldError("messages", str(error)) from None
    return turns


def pictures_of(turns: tuple[Turn, ...]) -> list[Picture]:
    return [part for turn in turns for part in turn.parts if isinstance(part, Picture)]


def texts_of(turns: tuple[Turn, ...]) -> list[str]:
    """What is said in each, without its pictures."""
    return ["\n".join(p for p in turn.parts if isinstance(p, str)) for turn in turns]


def messages_of(turns: tuple[Turn, ...], source: Callable[[Picture], ImageSource]) -> list[Message]:
    """The runtime's messages. `source` gets a picture."""
    return [Message(turn.role, _content(turn.parts, source)) for turn in turns]


def _content(parts: tuple[str | Picture, ...], source: Callable[[Picture], ImageSource]) -> Content:
    content: list[str | ImageSource] = []
    for part in parts:
        if content:
            content.append("\n")
        content.append(part if isinstance(part, str) else source(part))
    return tuple(content)


def _turn(message: Any, name: str) -> Turn:
    if not isinstance(message, dict):
        raise FieldError(name, f"{name} is {shown(message)}, expected an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise FieldError(
            f"{name}.role", f"role is {shown(role)}, expected system, user or assistant"
        )
    for key in _CALLS:
        if message.get(key):
            raise FieldError(f"{name}.{key}", f"{key} is nothing this server can do; leave it out")
    for key in message:
        if key not in _READ and key.lower() in PICTURE_WORDS and message[key]:
            raise FieldError(
                f"{name}.{key}", f'{key} is no field of a message; send a part "image_url"'
            )
    parts = _parts(message.get("content"), f"{name}.content")
    if role != "user" and any(isinstance(part, Picture) for part in parts):
        raise FieldError(
            f"{name}.content", f"the {role}'s message holds a picture; only the user shows pictures"
        )
    return Turn(_ROLES[role], parts)


def _parts(content: Any, name: str) -> tuple[str | Picture, ...]:
    if isinstance(content, str):
        return (_unicode(content, name),)
    if not isinstance(content, list) or not content:
        raise FieldError(name, f"content is {shown(content)}, expected a string or a list of parts")
    return tuple(_part(part, f"{name}[{i}]") for i, part in enumerate(content))


def _part(part: Any, name: str) -> str | Picture:
    match part:
        case {"type": "text" | "input_text", "text": str(text)}:
            return _unicode(text, name)
        case {"type": "image_url", "image_url": {"url": url, **rest}}:
            return read_picture(url, rest.get("detail"), f"{name}.image_url")
        case {"type": "image_url" | "input_image", "image_url": str(url), **rest}:
            return read_picture(url, rest.get("detail"), f"{name}.image_url")
        case {"type": str(kind)} if kind not in ("text", "input_text", "image_url", "input_image"):
            raise FieldError(
                f"{name}.type", f"a part is of type {shown(kind)}, expected text or image_url"
            )
    raise FieldError(
        name,
        'a part is neither {"type": "text", "text": ...} nor {"type": "image_url", "image_url": '
        '{"url": ...}}',
    )


def _unicode(text: str, name: str) -> str:
    try:
        return require_unicode(text, "the text")
    except UserError as error:
        raise FieldError(name, str(error)) from None
