"""From a request to tiles and token ids, within an engine's limits. No model is needed for it.

Any number of threads may prepare at once: nothing here is shared but what is only read.
"""

from __future__ import annotations

import time

from nvlm.inputs.images import make_of_pages
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.prompt import ImageSlot, PromptPart, Role, build_prompt
from nvlm.inputs.tiling import TiledImage, Tiler
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.model.config import TilingConfig
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from runtime.decoder.executor import check_max_new_tokens, check_prompt_length
from runtime.decoder.guidance import Guidance
from runtime.decoder.xgrammar_schema import check_guide
from runtime.engine.engine_dir import EngineDir
from runtime.requests.messages import ImageSource
from runtime.requests.sampling import (
    SamplingParams,
    check_target,
    require_consistent,
    require_places,
    require_vocabulary,
)
from runtime.requests.types import GenerationRequest
from runtime.serving.ticket import Ticket

_Turn = tuple[Role, list[str | TiledImage]]


def compile_guide(engine: EngineDir, guidance: Guidance, ticket: Ticket) -> None:
    """Raises `UserError` for a guide that the engine's decoder cannot follow."""
    guide = ticket.request.guide
    if guide is None:
        return
    check_guide(guide, engine.decoder_target)
    if engine.decoder_target == "torch":  # TensorRT-LLM compiles guides itself
        ticket.compiled_guide = guidance.compile(guide)


def prepare(
    engine: EngineDir, tokenizer: Tokenizer, ticket: Ticket, budget: PictureBudget | None = None
) -> None:
    """Tiles the images and tokenises the prompt. `budget` is what all who prepare at once share.

    Raises `UserError` for a request this engine cannot answer, the cheap reasons first.
    """
    begun = time.perf_counter()
    request = ticket.request
    check_max_new_tokens(request.max_new_tokens)
    require_consistent(request.sampling, request.max_new_tokens)
    require_places(request.sampling, engine.limits.max_batch_size)
    vocab_size = engine.checkpoint_config.decoder.vocab_size
    require_vocabulary(request.sampling, request.end_ids, vocab_size)
    check_target(request.sampling, engine.decoder_target)
    _check_text_size(request, engine, tokenizer)
    *history, (_, content) = turns = _tile(request, engine, budget)
    prompt = build_prompt(
        _slots(content),
        tokenizer,
        tokens_per_tile=engine.vision_config.tokens_per_tile,
        vocab_size=vocab_size,
        system=request.system,
        history=[(role, _slots(content)) for role, content in history],
        prompt_format=request.prompt_format,
    )
    check_prompt_length(len(prompt.token_ids), engine.limits)
    _check_room(request.sampling, engine.limits.max_seq_len - len(prompt.token_ids))
    ticket.prompt_ids = prompt.token_ids
    ticket.images = [
        part for _, content in turns for part in content if isinstance(part, TiledImage)
    ]
    ticket.cache_keys = tuple(image.cache_key for image in ticket.images)
    ticket.tiling_s = time.perf_counter() - begun


def check_num_images(num_images: int, limits: EngineLimits) -> None:
    if num_images > limits.max_num_images:
        raise UserError(
            f"the request has {num_images} images, the engine takes {limits.max_num_images}; "
            "build it with a larger --max_num_images"
        )


def _check_room(sampling: SamplingParams, room: int) -> None:
    """Refuses an answer that must be longer than fits; what may be longer ends there."""
    if sampling.min_tokens > room:
        raise UserError(
            f"min_tokens is {sampling.min_tokens}, and after the prompt the engine has room for "
            f"{room} tokens; lower it, or build the engine with a larger --max_seq_len"
        )


def _check_text_size(request: GenerationRequest, engine: EngineDir, tokenizer: Tokenizer) -> None:
    """Refuses text that cannot fit before time goes into tokenising it."""
    text = [request.system, *(turn.text for turn in request.turns)]
    num_characters = sum(map(len, text))
    most = engine.limits.max_input_len * tokenizer.max_token_bytes
    if num_characters > most:
        raise UserError(
            f"the prompt has {num_characters:,} characters, which is more than "
            f"{engine.limits.max_input_len} tokens, what the engine takes, can hold; shorten it or "
            "build the engine with a larger --max_input_len"
        )


def _slots(content: list[str | TiledImage]) -> list[PromptPart]:
    return [part if isinstance(part, str) else ImageSlot(part.num_tiles) for part in content]


def tile_pages(
    source: ImageSource,
    name: str,
    request: GenerationRequest,
    engine: EngineDir,
    room: int = 1,
    budget: PictureBudget | None = None,
) -> list[TiledImage]:
    """The pages of one picture as `request` has them cut, at most `room`. Errors call it
    `name`."""
    tiling = engine.tiling
    if callable(source):
        source = source()
    if isinstance(source, TiledImage):
        _check_tiles(source, tiling.image_size, tiling.max_tiles_per_image)
        return [source]
    tiler = Tiler(tiling.image_size, _max_num_tiles(request, tiling))
    return [*make_of_pages(tiler, source, name, request.pictures, room, budget)]


def _max_num_tiles(request: GenerationRequest, tiling: TilingConfig) -> int:
    most = tiling.max_num_tiles if request.max_num_tiles is None else request.max_num_tiles
    if not 1 <= most <= tiling.max_num_tiles:
        raise UserError(f"max_num_tiles is {most}, expected 1 to {tiling.max_num_tiles}")
    return most


def _tile(
    request: GenerationRequest, engine: EngineDir, budget: PictureBudget | None
) -> list[_Turn]:
    """All turns, with their images tiled."""
    num_images, most = request.num_images, engine.limits.max_num_images
    check_num_images(num_images, engine.limits)
    _max_num_tiles(request, engine.tiling)  # also where there is no image
    turns: list[_Turn] = []
    number, num_pages = 0, num_images
    for turn in request.turns:
        content: list[str | TiledImage] = []
        for part in turn.content:
            if isinstance(part, str):
                content.append(part)
                continue
            number += 1
            name = "the image" if num_images == 1 else f"image {number} of {num_images}"
            pages = tile_pages(part, name, request, engine, most - num_pages + 1, budget)
            num_pages += len(pages) - 1
            # Further pages stand as further images of `images_first` would.
            content += [piece for page in pages[:-1] for piece in (page, "\n")]
            content.append(pages[-1])
        turns.append((turn.role, content))
    return turns


def _check_tiles(image: TiledImage, size: int, most: int) -> None:
    """What a client tiled itself must be what our tiling could have made."""
    if image.tiles.shape[1:] != (size, size, 3) or not 1 <= image.num_tiles <= most:
        raise UserError(
            f"an image has tiles of shape {list(image.tiles.shape)}, expected 1 to {most} tiles of "
            f"{size} x {size} RGB pixels"
        )
