"""What goes into the runner and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from nvlm.inputs.images import PictureRules
from nvlm.inputs.picture_source import picture_source
from nvlm.inputs.prompt import DEFAULT_SYSTEM, PromptFormat
from nvlm.inputs.tiling import Grid
from nvlm.planning.limits import DEFAULT_MAX_NEW_TOKENS
from nvlm.program.errors import UserError, shown
from nvlm.program.nearest import nearest
from runtime.requests.boxes import Box
from runtime.requests.fields import OTHER_WORDS, check_fields, require_page
from runtime.requests.guide import GUIDE_KINDS, Guide, given_guide
from runtime.requests.messages import (
    Content,
    Conversation,
    GivenImage,
    Message,
    PictureReader,
    content_of,
    conversation,
    items,
    num_images,
    question,
)
from runtime.requests.sampling import SETTINGS, SamplingParams, given_settings, with_sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A question about zero or more images, alone or as the next turn of a conversation.

    An image in `content` is a file's path, its bytes, RGB pixels [height, width, 3], tiles, or a
    function that gets one of the first three when the request is prepared. A Pillow image becomes
    pixels at once; a text alone stands for a tuple of one. Raises `UserError` for content that is
    neither text nor an image, and for a field of another type: found later, it would end the
    questions that share the decoder's steps.
    """

    content: Content  # what the user says, in order: text and images
    system: str = DEFAULT_SYSTEM  # the message before the history
    prompt_format: PromptFormat = "hf"  # chat template: Hugging Face's or Megatron-LM's
    max_num_tiles: int | None = None  # most tiles of an image's grid; None: the engine's own number
    # How picture files become pixels, and which of their pages.
    pictures: PictureRules = field(default_factory=PictureRules)
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS  # longest answer, in tokens
    stop: tuple[str, ...] = ()  # strings that end the answer and are not part of it
    end_ids: frozenset[int] = frozenset()  # tokens that do so, beside <|im_end|>
    # How tokens are chosen, and what is returned of them.
    sampling: SamplingParams = field(default_factory=SamplingParams)
    history: tuple[Message, ...] = ()  # the turns before, oldest first
    # What the answer must match; it goes with no stop string, which would cut it.
    guide: Guide | None = None
    # The smallest is the next of those that wait, and of equal ones the first that came. It
    # interrupts none that runs.
    priority: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "content", content_of(self.content))
        object.__setattr__(self, "stop", items(self.stop))
        object.__setattr__(self, "end_ids", frozenset(items(self.end_ids)))
        object.__setattr__(self, "history", tuple(self.history))
        check_fields(self)
        for turn in self.history:
            if not isinstance(turn, Message) or turn.role == "system":
                raise UserError("history holds Messages of the user and the assistant alone")
        if self.guide is not None and any(self.stop):
            raise UserError(
                f"stop is given beside {self.guide.name}, whose answer it would cut; leave one out"
            )
        if self.guide is not None and self.sampling.ignore_eos:
            raise UserError(
                f"ignore_eos is given beside {self.guide.name}, whose answer ends where it "
                "matches; leave one out"
            )

    @classmethod
    def images_first(
        cls, prompt: str, images: GivenImage | Iterable[GivenImage] = (), **settings: Any
    ) -> GenerationRequest:
        """The usual order: each image and a newline, then the question. Where `prompt` has
        `<image>`, the next image stands there instead.

        settings: the other fields of a request, those of `SamplingParams` by their names (a filter
        without a temperature means temperature 1), `page`, a number from 1 or "all", and a guide by
        its name, such as json_schema. Raises `UserError` for another name.
        """
        asked = Conversation(content=question(prompt, items(images)))
        return cls._from_settings(asked, settings)

    @classmethod
    def from_messages(
        cls,
        messages: Sequence[Any],
        images: GivenImage | Iterable[GivenImage] = (),
        source: PictureReader = picture_source,
        **settings: Any,
    ) -> GenerationRequest:
        """A conversation that ends with the user's message: each message a `Message`, or a dict of
        `role` (system, user, assistant) and `content`, a string or a list of parts as JSON has
        them. An image in a part may be whatever `images_first` takes; `source` gets a `str`.

        `images` stand where the user's strings have `<image>`. settings: as `images_first`.
        """
        asked = conversation(messages, items(images), source, has_system="system" in settings)
        return cls._from_settings(asked, settings)

    @classmethod
    def of(
        cls,
        request: GenerationRequest | str | None = None,
        images: GivenImage | Iterable[GivenImage] = (),
        messages: Sequence[Any] | None = None,
        **settings: Any,
    ) -> GenerationRequest:
        """A question and its images, as `images_first`; `messages`, as `from_messages`; a whole
        request as it is."""
        if messages is not None:
            if request is not None:
                raise UserError("messages is given beside a question; make that the last message")
            return cls.from_messages(messages, images, **settings)
        if isinstance(request, str):
            return cls.images_first(request, images, **settings)
        if request is None:
            raise UserError(
                'no question is given; give it first, as in generate("What is this?"), or messages'
            )
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

    @classmethod
    def _from_settings(cls, asked: Conversation, settings: dict[str, Any]) -> GenerationRequest:
        sampling_names = {setting.name for setting in SETTINGS}
        names = {each.name for each in fields(cls)} - {"content"} | sampling_names
        names |= GUIDE_KINDS.keys() | {"page"}
        for name in settings:
            if name not in names:
                raise UserError(
                    f"a question has no setting {shown(name)}, expected one of "
                    f"{', '.join(sorted(names))}{nearest(name, names, OTHER_WORDS)}"
                )
        given = {name: settings.pop(name) for name in list(settings) if name in sampling_names}
        if given:
            defaults = settings.get("sampling", SamplingParams())
            settings["sampling"] = with_sampling(defaults, given_settings(given))
        if (page := settings.pop("page", None)) is not None:
            rules = settings.get("pictures", PictureRules())
            settings["pictures"] = replace(rules, page=require_page(page))
        guides: dict[str, Any] = {
            name: settings.pop(name) for name in GUIDE_KINDS if name in settings
        }
        if guides:
            settings["guide"] = given_guide(guides)
        return cls(**{**asked, **settings})

    @property
    def turns(self) -> tuple[Message, ...]:
        """The user's and the assistant's, up to the one that is answered."""
        return (*self.history, Message("user", self.content))

    @property
    def num_images(self) -> int:
        """Images of all turns."""
        return sum(num_images(turn.content) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Timings:
    """Milliseconds. The first five add up to total_ms."""

    queue_ms: float  # waiting between the stages, as in a batch or a server
    tiling_ms: float  # reading and cutting the pictures
    vision_ms: float  # encoding the tiles
    prefill_ms: float  # from the decoder's queue to the first token
    decode_ms: float  # from the first token to the end
    total_ms: float  # from the question to the end
    decode_tokens_per_s: float  # over the tokens after the first


@dataclass(frozen=True, slots=True)
class LikelyToken:
    """A token that the model thought likely in its place."""

    token_id: int  # in the vocabulary
    token: str  # its text, with U+FFFD for a part of a character
    # Natural logarithm of the probability that the model gave it, before any setting changed that.
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprob(LikelyToken):
    """A token of the answer or the prompt, and its rivals."""

    top_logprobs: list[LikelyToken]  # the likeliest tokens of its place, likeliest first


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers to a request."""

    text: str  # without the stop string, unless `sampling` keeps it
    token_ids: list[int]  # without the end token
    finish_reason: FinishReason  # why it ended
    boxes: list[Box]  # regions that the text names
    seed: int | None = None  # repeats the answer; None: nothing was drawn
    logprobs: list[TokenLogprob] | None = None  # one for each of `token_ids`; None: not asked for


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole answer. What is one choice's is the first choice's."""

    text: str  # the first choice's, as all fields that `Choice` has
    token_ids: list[int]  # without the end token
    finish_reason: FinishReason  # why it ended
    num_prompt_tokens: int  # virtual tokens included
    num_tokens: int  # of all choices
    num_tiles: int  # of all images, thumbnails included
    grids: list[Grid]  # of each image
    boxes: list[Box]  # regions that the text names
    timings: Timings  # in milliseconds
    seed: int | None = None  # repeats the answer; None: nothing was drawn
    logprobs: list[TokenLogprob] | None = None  # one for each of `token_ids`; None: not asked for
    # One for each token of the prompt, None for the first, which nothing foretells, and for
    # pictures' rows. None: not asked for.
    prompt_logprobs: list[TokenLogprob | None] | None = None
    # Of the prompt, tokens that earlier requests had computed; None: the decoder does not say. Two
    # answers that differ in it alone are equal.
    num_reused_tokens: int | None = field(default=None, compare=False)
    choices: tuple[Choice, ...] = ()  # all n answers


@dataclass(frozen=True, slots=True)
class Answer:
    """One piece of an answer: new text, and with the last piece a result or an error."""

    text: str = ""  # that the piece adds
    result: GenerationResult | None = None  # with the last piece, if all went well
    error: Exception | None = None  # with the last piece, if not
    index: int = 0  # which of the n answers the text belongs to
    finish_reason: FinishReason | None = None  # with the last piece of that answer
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens that the piece adds, if asked for

    @property
    def is_last(self) -> bool:
        return self.result is not None or self.error is not None
