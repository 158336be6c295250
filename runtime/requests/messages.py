"""A conversation: who says what, and the pictures in it.

Every door says it in one of two ways, both read here: `prompt`, a single question, and `messages`,
the whole conversation as chat clients write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from nvlm.inputs.images import EncodedImage
from nvlm.inputs.picture_source import picture_source
from nvlm.inputs.pillow_image import pixels_of
from nvlm.inputs.prompt import IMAGE_MARK, Role
from nvlm.inputs.tiling import TiledImage
from nvlm.program.errors import UserError, shown

ImageSource = EncodedImage | TiledImage | Callable[[], EncodedImage | TiledImage]
GivenImage = ImageSource | str | Image.Image
"""What a caller may give for an image: a `str` is a path."""

Content = tuple[str | ImageSource, ...]
"""Text and images in their order. `<image>` in such a text is text."""

PictureReader = Callable[[str], ImageSource]
"""Gets the image that a string names, or says why it does not."""

_ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_ONE = (str, Path, bytes, np.ndarray, Image.Image, TiledImage)
_BYTES = (bytearray, memoryview)
_EXPECTED_IMAGE = "a file's path, its bytes, a Pillow image or uint8 RGB pixels [height, width, 3]"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Raises `UserError` for another role, and for an image that the user does not show.
    """

    role: Role  # system, user or assistant
    content: Content  # as that of a request

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise UserError(f"role is {shown(self.role)}, expected system, user or assistant")
        object.__setattr__(self, "content", content_of(self.content))
        if self.role != "user" and num_images(self.content):
            raise UserError(f"the {self.role}'s message holds an image; only the user shows images")

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))


class Conversation(TypedDict, total=False):
    """The fields of a `GenerationRequest` that a conversation decides. Without a system message it
    leaves `system` out."""

    content: Content
    history: tuple[Message, ...]
    system: str


def items(given: Any) -> tuple[Any, ...]:
    """A text or an image alone is one thing, and not the sequence that Python takes it for."""
    if given is None:
        return ()
    # An open file gives its lines one by one.
    is_one = isinstance(given, (*_ONE, *_BYTES, Mapping)) or hasattr(given, "read")
    is_several = isinstance(given, Iterable) and not is_one
    return tuple(given) if is_several else (given,)


def content_of(given: Any) -> Content:
    """Text and images, a single one or several. Raises `UserError` for what is neither."""
    return tuple(map(_part, items(given)))


def num_images(content: Content) -> int:
    return sum(not isinstance(part, str) for part in content)


def question(prompt: str, images: Iterable[GivenImage] = ()) -> Content:
    """A question and its images: each where `prompt` has an `<image>`. Without such marks each
    comes first, before a newline. The published chat() does both.

    Raises `UserError` where marks and images differ in number.
    """
    sources = tuple(map(_source_of, images))
    if IMAGE_MARK not in prompt:
        return (*(part for image in sources for part in (image, "\n")), prompt)
    _check_marks(prompt.count(IMAGE_MARK), len(sources))
    return _in_place(prompt, iter(sources))


def conversation(
    messages: Any,
    images: Iterable[GivenImage] = (),
    source: PictureReader = picture_source,
    *,
    has_system: bool = False,
) -> Conversation:
    """Reads messages: each a `Message`, or an object of `role` and `content`, which is a string or
    a list of parts. `source` gets an image that a part names.

    `images` stand where the user's strings have an `<image>`; those of a single question may do
    without. has_system: a system message is given beside them. Raises `UserError` for what is no
    conversation that ends with the user's message.
    """
    if not _is_list(messages):
        raise UserError(f"messages is {shown(messages)}, expected a list of messages")
    turns = [_read(message, f"message {i}", source) for i, message in enumerate(messages, start=1)]
    _check_order([role for role, _ in turns])
    sources = tuple(map(_source_of, images))
    asked = [content for role, content in turns if role == "user"]
    if len(asked) > 1 or not isinstance(asked[0], str):
        marks = (text.count(IMAGE_MARK) for text in asked if isinstance(text, str))
        _check_marks(sum(marks), len(sources))
    left = iter(sources)
    read = []
    for role, content in turns:
        if isinstance(content, str):
            if role != "user":
                content = (content,)
            elif len(asked) == 1:
                content = question(content, sources)
            else:
                content = _in_place(content, left)
        read.append(Message(role, content))
    system = read.pop(0) if read[0].role == "system" else None
    found = Conversation(content=read[-1].content, history=tuple(read[:-1]))
    if system is None:
        return found
    if has_system:
        raise UserError("system stands beside messages with a system message; give one of them")
    return {**found, "system": system.text}


def parts(given: Any, name: str, source: PictureReader = picture_source) -> Content:
    """A list of parts, as JSON has them. `name` is what errors call it; `source` gets an image that
    a part names."""
    if not _is_list(given):
        raise UserError(f"{name} is {shown(given)}, expected a string or a list of parts")
    read: list[str | ImageSource] = []
    for part in given:
        match part:
            case {"type": "text", "text": str(text)}:
                read.append(text)
            case {"type": "image", "image": str(path)}:
                read.append(source(path))
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                read.append(source(url))
            case {"type": "image", "image": image} if _is_image(image):
                read.append(_part(image))
            case _:
                raise UserError(
                    f"{name} part {shown(part)} is neither "
                    '{"type": "text", "text": ...} nor {"type": "image", "image": path or data: '
                    'URL}, or "image_url" as chat messages have it'
                )
    return tuple(read)


def _read(message: Any, name: str, source: PictureReader) -> tuple[Role, str | Content]:
    """Its role and content; a string's marks are not looked at yet."""
    if isinstance(message, Message):
        return message.role, message.content
    if not isinstance(message, Mapping):
        raise UserError(f'{name} is {shown(message)}, expected {{"role": ..., "content": ...}}')
    if unknown := sorted(map(str, message.keys() - {"role", "content"})):
        raise UserError(
            f"{name} has an unknown field {shown(unknown[0])}, expected role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise UserError(f"{name} has role {shown(role)}, expected system, user or assistant")
    return role, content if isinstance(content, str) else parts(content, f"{name} content", source)


def _check_order(roles: Sequence[Role]) -> None:
    """A system message first, if any, and the user's last."""
    if not roles:
        raise UserError('messages is empty, expected at least {"role": "user", "content": ...}')
    if "system" in roles[1:]:
        place = roles.index("system", 1) + 1
        raise UserError(f"message {place} is a system message; only the first may be one")
    if roles[-1] != "user":
        raise UserError(
            f"the last message is the {roles[-1]}'s, expected the user's, which is answered"
        )


def _check_marks(num_marks: int, num_images: int) -> None:
    if num_marks != num_images:
        raise UserError(
            f"the number of <image> in the text is {num_marks} and that of images {num_images}, "
            'expected the same; where <image> is meant as text, give {"type": "text", ...}'
        )


def _in_place(text: str, images: Iterator[ImageSource]) -> Content:
    """The next image stands where an `<image>` was."""
    first, *others = text.split(IMAGE_MARK)
    content: list[str | ImageSource] = [first]
    for piece in others:
        content += [next(images), piece]
    return tuple(part for part in content if not isinstance(part, str) or part)


def _source_of(image: GivenImage) -> ImageSource:
    found = picture_source(image) if isinstance(image, str) else _part(image)
    assert not isinstance(found, str)
    return found


def _part(part: Any) -> Any:
    if isinstance(part, Image.Image):
        return pixels_of(part)
    if isinstance(part, _BYTES):
        return bytes(part)
    if isinstance(part, _ONE) or callable(part):
        return part
    raise UserError(
        f"a question holds a {type(part).__name__}, expected text or an image: {_EXPECTED_IMAGE}"
    )


def _is_image(given: Any) -> bool:
    return isinstance(given, (*_ONE, *_BYTES)) or callable(given)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, (str, bytes, *_BYTES))
