"""What goes into the runner and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from nvlm.inputs.images import EncodedImage, PictureRules
from nvlm.inputs.prompt import DEFAULT_SYSTEM, PromptFormat
from nvlm.inputs.tiling import Grid, TiledImage
from nvlm.planning.limits import DEFAULT_MAX_NEW_TOKENS
from runtime.requests.boxes import Box
from runtime.requests.sampling import SamplingParams

FinishReason = Literal["stop", "length"]

ImageSource = EncodedImage | TiledImage | Callable[[], EncodedImage]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A question about zero or more images.

    `content` is what the user says, in order: text and images (a file's path, its bytes, RGB
    pixels [height, width, 3], tiles, or a function that gets one of the first three when the
    request is prepared). Without `max_num_tiles` the engine's own number applies.
    `pictures` says how picture files become pixels, and which of their pages.
    `stop` holds strings that end the answer and are not part of it, `end_ids` tokens that do so
    beside <|im_end|>.
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

    @classmethod
    def images_first(
        cls, prompt: str, images: tuple[ImageSource, ...] = (), **options: object
    ) -> GenerationRequest:
        """The usual order: each image and a newline, then the question."""
        before = [part for image in images for part in (image, "\n")]
        return cls(content=(*before, prompt), **options)  # type: ignore[arg-type]

    @property
    def num_images(self) -> int:
        return sum(not isinstance(part, str) for part in self.content)


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
