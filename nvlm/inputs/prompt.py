"""The ChatML prompt around a conversation and its images, as token ids.

Two published forms: `hf` (modeling_nvlm_d.py, conversation.py) and `megatron` (Megatron-LM
examples/multimodal, prompt format qwen2p0). They differ in the newline after <|im_end|> and in
whether a tile tag is tokenised together with the text before it. `raw` is the content alone,
without a template.

An id >= vocab_size stands for row `id - vocab_size` of the request's prompt table (TensorRT-LLM's
prompt tuning). Rows are numbered through all images in the order of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from nvlm.inputs.tokenizer import IM_END, IM_START, Tokenizer
from nvlm.program.unicode import require_unicode

PromptFormat = Literal["hf", "megatron", "raw"]
Role = Literal["system", "user", "assistant"]
DEFAULT_SYSTEM = "Answer the questions."
IMAGE_MARK = "<image>"
"""Stands for the next image in a string that is asked; it never reaches the model."""
THUMBNAIL_TAG = "<tile_global_thumbnail>"

# (newline after <|im_end|>, tags tokenised apart from the text before them)
_FORMATS: dict[PromptFormat, tuple[str, bool]] = {
    "hf": ("", False),
    "megatron": ("\n", True),
    "raw": ("", False),
}


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """Where one image stands in the prompt."""

    num_tiles: int  # of the image, thumbnail included


PromptPart = str | ImageSlot
Turn = tuple[Role, Sequence[PromptPart]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the decoder takes it."""

    token_ids: list[int]  # text ids and virtual ids
    num_virtual_tokens: int  # rows of the prompt table


@dataclass(frozen=True, slots=True)
class _Special:
    name: str  # a token that the tokenizer has whole, such as <|im_end|>


class _Break:
    """Ends a run of text: what stands on either side is tokenised separately."""


_Item = str | int | _Special | _Break


def tile_tags(num_tiles: int) -> list[str]:
    """<tile_1> ... <tile_{n-1}> and the thumbnail's; a single tile has only the thumbnail's."""
    return [f"<tile_{k}>" for k in range(1, num_tiles)] + [THUMBNAIL_TAG]


def images_first(num_tiles: Sequence[int], question: str) -> list[PromptPart]:
    """The usual order: each image and a newline, then the question."""
    parts: list[PromptPart] = []
    for count in num_tiles:
        parts += [ImageSlot(count), "\n"]
    return [*parts, question]


def build_prompt(
    parts: Iterable[PromptPart],
    tokenizer: Tokenizer,
    *,
    tokens_per_tile: int,
    vocab_size: int,
    system: str = DEFAULT_SYSTEM,
    history: Iterable[Turn] = (),
    prompt_format: PromptFormat = "hf",
) -> Prompt:
    """Token ids of the user's turn `parts`, after those of `history`, with an open assistant turn
    after it. With prompt_format `raw` those of `parts` alone, which the model continues.

    The text is split only at the special tokens placed here; each run between them is tokenised
    as one string with special-token parsing off. Raises `UserError` for text that is not Unicode.
    """
    turn_end, tags_apart = _FORMATS[prompt_format]
    items: list[_Item] = []
    if prompt_format == "raw":
        return _tokenize(_content(parts, tokens_per_tile, tags_apart), tokenizer, vocab_size)
    for role, content in (("system", [system]), *history, ("user", list(parts))):
        items += [_Special(IM_START), f"{role}\n"]
        items += _content(content, tokens_per_tile, tags_apart)
        items += [_Special(IM_END), turn_end]
    items += [_Special(IM_START), "assistant\n"]
    return _tokenize(items, tokenizer, vocab_size)


def _content(
    parts: Iterable[PromptPart], tokens_per_tile: int, tags_apart: bool
) -> Iterator[_Item]:
    for part in parts:
        if isinstance(part, str):
            yield part
            continue
        yield "<Image>"
        for tag in tile_tags(part.num_tiles):
            if tags_apart:
                yield _Break()
            yield tag
            yield tokens_per_tile
        yield "</Image>"


def prompt_text(content: Iterable[object], system: str, prompt_format: PromptFormat) -> str:
    """The prompt before the assistant's turn as Megatron-LM logs it: each part that is no string
    is an image, written <image>, without its tiles."""
    turn_end = f"{IM_END}{_FORMATS[prompt_format][0]}"
    user = "".join(part if isinstance(part, str) else "<Image><image></Image>" for part in content)
    return f"{IM_START}system\n{system}{turn_end}{IM_START}user\n{user}{turn_end}"


def _tokenize(items: Iterable[_Item], tokenizer: Tokenizer, vocab_size: int) -> Prompt:
    """Integers count virtual tokens; neighbouring strings form one run."""
    token_ids: list[int] = []
    run, num_virtual_tokens = "", 0

    def end_run() -> None:
        nonlocal run
        if run:
            token_ids.extend(tokenizer.encode(require_unicode(run, "the prompt")))
        run = ""

    for item in items:
        if isinstance(item, str):
            run += item
            continue
        end_run()
        if isinstance(item, _Special):
            token_ids.append(tokenizer.special_id(item.name))
        elif isinstance(item, int):
            first = vocab_size + num_virtual_tokens
            token_ids.extend(range(first, first + item))
            num_virtual_tokens += item
    end_run()
    return Prompt(token_ids, num_virtual_tokens)
