"""What goes into the runner and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from nvlm.inputs.images import EncodedImage, PictureRules
from nvlm.inputs.pillow_image import pixels_of
from nvlm.inputs.prompt import DEFAULT_SYSTEM, PromptFormat
from nvlm.inputs.tiling import Grid, TiledImage
from nvlm.planning.limits import DEFAULT_MAX_NEW_TOKENS
from nvlm.program.errors import UserError, shown
from nvlm.program.nearest import nearest
from runtime.requests.boxes import Box
from runtime.requests.picture_source import picture_source
from runtime.requests.sampling import SETTINGS, SamplingParams, given_settings, with_sampling

FinishReason = Literal["stop", "length"]

ImageSource = EncodedImage | TiledImage | Callable[[], EncodedImage]
GivenImage = ImageSource | str | Image.Image
"""What a caller may give for an image: a `str` is a path."""

_EXPECTED_IMAGE = "a file's path, its bytes, a Pillow image or uint8 RGB pixels [height, width, 3]"


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A question about zero or more images.

    `content` is what the user says, in order: text and images (a file's path, its bytes, RGB
    pixels [height, width, 3], tiles, or a function that gets one of the first three when the
    request is prepared). Without `max_num_tiles` the engine's own number applies.
    `pictures` says how picture files become pixels, and which of their pages.
    `stop` holds strings that end the answer and are not part of it, `end_ids` tokens that do so
    beside <|im_end|>.

    A Pillow image becomes pixels at once; a text alone stands for a tuple of one. Raises
    `UserError` for content that is neither text nor an image.
    """

    content: tuple[str | ImageSource, ...]
    system: str = DEFAULT_SYSTEM
    prompt_format: PromptFormat = "hf"
    max_num_tiles: int | None = None
    pictures: PictureRules = field(default_factory=PictureRules)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    end_ids: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", tuple(map(_part, _items(self.content))))
        object.__setattr__(self, "stop", _items(self.stop))

    @classmethod
    def images_first(
        cls, prompt: str, images: GivenImage | Iterable[GivenImage] = (), **settings: Any
    ) -> GenerationRequest:
        """The usual order: each image and a newline, then the question.

        settings: the other fields of a request, and those of `SamplingParams` by their names (a
        filter without a temperature means temperature 1). Raises `UserError` for another name.
        """
        sampling_names = {setting.name for setting in SETTINGS}
        names = {each.name for each in fields(cls)} - {"content"} | sampling_names
        for name in settings:
            if name not in names:
                raise UserError(
                    f"a question has no setting {shown(name)}, expected one of "
                    f"{', '.join(sorted(names))}{nearest(name, names, _OTHER_WORDS)}"
                )
        given = {name: settings.pop(name) for name in list(settings) if name in sampling_names}
        if given:
            defaults = settings.get("sampling", SamplingParams())
            settings["sampling"] = with_sampling(defaults, given_settings(given))
        content: list[Any] = []
        for image in _items(images):
            content += [picture_source(image) if isinstance(image, str) else image, "\n"]
        return cls(content=(*content, prompt), **settings)

    @classmethod
    def of(
        cls,
        request: GenerationRequest | str,
        images: GivenImage | Iterable[GivenImage] = (),
        **settings: Any,
    ) -> GenerationRequest:
        """A question and its images, as `images_first`; a whole request as it is."""
        if isinstance(request, str):
            return cls.images_first(request, images, **settings)
        if not isinstance(request, GenerationRequest):
            raise UserError(
                f"the question is of type {type(request).__name__}, expected a str or a "
                "GenerationRequest, which takes text and images in any order"
            )
        if settings or not isinstance(images, tuple) or images:
            what = next(iter(settings), "images")
            raise UserError(
                f"{what} is given beside a whole GenerationRequest; make it a part of that, with "
                "dataclasses.replace"
            )
        return request

    @property
    def num_images(self) -> int:
        return sum(not isinstance(part, str) for part in self.content)


_OTHER_WORDS = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "stop_words": "stop",
    "stop_strings": "stop",
    "system_prompt": "system",
    "random_seed": "seed",
}
"""What other libraries call a setting."""


_ONE = (str, Path, bytes, np.ndarray, Image.Image, TiledImage)


def _items(given: Any) -> tuple[Any, ...]:
    """A text or an image alone is one thing, and not the sequence that Python takes it for."""
    if given is None:
        return ()
    is_several = isinstance(given, Iterable) and not isinstance(given, (*_ONE, Mapping))
    return tuple(given) if is_several else (given,)


def _part(part: Any) -> str | ImageSource:
    if isinstance(part, Image.Image):
        return pixels_of(part)
    if isinstance(part, _ONE) or callable(part):
        return part
    raise UserError(
        f"a question holds a {type(part).__name__}, expected text or an image: {_EXPECTED_IMAGE}"
    )


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds. All but the last two add up to total_ms."""

    queue_ms: float  # waiting between the stages, as in a batch or a server
    tiling_ms: float
    vision_ms: float
    prefill_ms: float  # from the decoder's queue to the first token
    decode_ms: float
    total_ms: float
    decode_tokens_per_s: float  # of the tokens after the first


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """num_prompt_tokens counts virtual tokens; token_ids leaves out the end token."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int
    num_tokens: int
    num_tiles: int
    grids: list[Grid]
    boxes: list[Box]
    timings: Timings


@dataclass(frozen=True, slots=True)
class Answer:
    """One piece of an answer: new text, and with the last piece `result` or `error`."""

    text: str = ""
    result: GenerationResult | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.result is not None or self.error is not None
