"""From a request to tiles and token ids, within an engine's limits. No model is needed for it.

Any number of threads may prepare at once: nothing here is shared but what is only read.
"""

from __future__ import annotations

import time

from nvlm.inputs.images import make_of_pages
from nvlm.inputs.picture_budget import PictureBudget
from nvlm.inputs.prompt import ImageSlot, build_prompt
from nvlm.inputs.tiling import TiledImage, Tiler
from nvlm.inputs.tokenizer import Tokenizer
from nvlm.planning.limits import EngineLimits
from nvlm.program.errors import UserError
from runtime.decoder.executor import check_max_new_tokens, check_prompt_length
from runtime.engine.engine_dir import EngineDir
from runtime.requests.sampling import check_target
from runtime.requests.types import GenerationRequest
from runtime.serving.ticket import Ticket


def prepare(
    engine: EngineDir, tokenizer: Tokenizer, ticket: Ticket, budget: PictureBudget | None = None
) -> None:
    """Tiles the images and tokenises the prompt. `budget` is what all who prepare at once share.

    Raises `UserError` for a request this engine cannot answer, the cheap reasons first.
    """
    begun = time.perf_counter()
    request = ticket.request
    check_max_new_tokens(request.max_new_tokens)
    check_target(request.sampling, engine.decoder_target)
    _check_text_size(request, engine, tokenizer)
    content = _tile(request, engine, budget)
    prompt = build_prompt(
        [part if isinstance(part, str) else ImageSlot(part.num_tiles) for part in content],
        tokenizer,
        tokens_per_tile=engine.vision_config.tokens_per_tile,
        vocab_size=engine.checkpoint_config.decoder.vocab_size,
        system=request.system,
        prompt_format=request.prompt_format,
    )
    check_prompt_length(len(prompt.token_ids), engine.limits)
    ticket.prompt_ids = prompt.token_ids
    ticket.images = [part for part in content if isinstance(part, TiledImage)]
    ticket.tiling_s = time.perf_counter() - begun


def check_num_images(num_images: int, limits: EngineLimits) -> None:
    if num_images > limits.max_num_images:
        raise UserError(
            f"the request has {num_images} images, the engine takes {limits.max_num_images}; "
            "build it with a larger --max_num_images"
        )


def _check_text_size(request: GenerationRequest, engine: EngineDir, tokenizer: Tokenizer) -> None:
    """Refuses text that cannot fit before time goes into tokenising it."""
    text = [request.system, *(part for part in request.content if isinstance(part, str))]
    num_characters = sum(map(len, text))
    most = engine.limits.max_input_len * tokenizer.max_token_bytes
    if num_characters > most:
        raise UserError(
            f"the prompt has {num_characters:,} characters, which is more than "
            f"{engine.limits.max_input_len} tokens, what the engine takes, can hold; shorten it or "
            "build the engine with a larger --max_input_len"
        )


def _tile(
    request: GenerationRequest, engine: EngineDir, budget: PictureBudget | None
) -> list[str | TiledImage]:
    tiling, limits = engine.tiling, engine.limits
    num_images = request.num_images
    check_num_images(num_images, limits)
    max_num_tiles = request.max_num_tiles
    if max_num_tiles is None:
        max_num_tiles = tiling.max_num_tiles
    if not 1 <= max_num_tiles <= tiling.max_num_tiles:
        raise UserError(f"max_num_tiles is {max_num_tiles}, expected 1 to {tiling.max_num_tiles}")
    content: list[str | TiledImage] = []
    number, num_pages = 0, num_images
    for part in request.content:
        number += not isinstance(part, str)
        if isinstance(part, TiledImage):
            _check_tiles(part, tiling.image_size, tiling.max_tiles_per_image)
        elif not isinstance(part, str):
            source = part() if callable(part) else part
            name = "the image" if num_images == 1 else f"image {number} of {num_images}"
            room = limits.max_num_images - num_pages + 1
            tiler = Tiler(tiling.image_size, max_num_tiles)
            pages = [*make_of_pages(tiler, source, name, request.pictures, room, budget)]
            num_pages += len(pages) - 1
            # Further pages stand as further images of `images_first` would.
            content += [piece for page in pages[:-1] for piece in (page, "\n")]
            part = pages[-1]
        content.append(part)
    return content


def _check_tiles(image: TiledImage, size: int, most: int) -> None:
    """What a client tiled itself must be what our tiling could have made."""
    if image.tiles.shape[1:] != (size, size, 3) or not 1 <= image.num_tiles <= most:
        raise UserError(
            f"an image has tiles of shape {list(image.tiles.shape)}, expected 1 to {most} tiles of "
            f"{size} x {size} RGB pixels"
        )
